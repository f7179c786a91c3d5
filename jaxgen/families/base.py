"""What every family of generators offers; nothing outside this room asks which family it is."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp

from jaxgen.errors import UserError
from jaxgen.nn.module import Params
from jaxgen.text.features import TextFeatures


class Shapes(NamedTuple):
    """What a network must know of its data: image (H, W, C) and the widths of the text features."""

    image: tuple[int, int, int]
    hidden: int
    pooled: int

    @classmethod
    def of(cls, image: Sequence[int], text: TextFeatures) -> Self:
        """Those of pictures of shape `image` (H, W, C) with these features."""
        height, width, channels = image
        return cls((height, width, channels), text.hidden.shape[-1], text.pooled.shape[-1])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampleSettings:
    """What to draw, and how. All numbers are traced: new values never recompile. A family reads those that mean
    something to it."""

    image: tuple[int, int, int] = field(metadata={"static": True})  # H, W, C
    sampler: str = field(default="heun", metadata={"static": True})
    num_steps: jax.Array | int = 20
    guidance_scale: jax.Array | float = 3.0  # 1 is no guidance
    guidance_low: jax.Array | float = 0.0  # guidance acts while low <= t <= high (arXiv 2404.07724)
    guidance_high: jax.Array | float = 1.0
    temperature: jax.Array | float = 1.0  # of what is drawn at random: latents, tokens
    top_k: jax.Array | int = 0  # tokens to choose among; 0 is all
    top_p: jax.Array | float = 1.0  # share of the probability to choose among


Losses = dict[str, tuple[jax.Array, dict[str, jax.Array]]]  # {group: (scalar, metrics)}


class Family(Protocol):
    """A frozen config dataclass, a subclass of this one.

    `params` is {group: tree}: in every step the groups are updated one after the other, in the order of `groups`, each by
    the gradient of its own loss for its own parameters; a later one's loss sees those updated before it. The running
    average of `drawn` is what draws, and all that is exported."""

    groups: ClassVar[tuple[str, ...]] = ("generator",)
    drawn: ClassVar[tuple[str, ...]] = ("generator",)
    samplers: ClassVar[tuple[str, ...]]  # the first is the default
    draws: ClassVar[bool] = True  # from captions; else these are not read, and `roundtrip` is what is judged

    def __hash__(self) -> int: ...  # the dataclass's own: what is compiled for a family is kept by it

    def init(self, key: jax.Array, shapes: Shapes) -> Params:
        """Fresh float32 parameters, {group: tree}. Raises UserError where the picture's shape does not fit."""
        ...

    def logical_axes(self, shapes: Shapes) -> Params:
        """The tree of `init` with logical axis names in each array's place."""
        ...

    def losses(self, params: Params, frozen: Params, batch: dict[str, Any], key: jax.Array) -> Losses:
        """{group: (scalar loss, metrics)} for batch {"image": float [B, H, W, C] in [-1, 1], "text": TextFeatures}."""
        ...

    def sample(
        self,
        params: Params,
        frozen: Params,
        text: TextFeatures,
        null_text: TextFeatures,
        key: jax.Array,
        settings: SampleSettings,
    ) -> jax.Array:
        """uint8 [B, H, W, C]: one picture for each of the B captions of `text`, each from its own key of `key` [B].

        `null_text` (B captions) is what guidance leads away from: the empty caption or a negative prompt."""
        ...

    def roundtrip(self, params: Params, frozen: Params, image: jax.Array) -> jax.Array:
        """float32 [B, H, W, C]: pictures (of the same shape, in [-1, 1]) as the network gives them back. Of a family that
        does not draw; the others raise UserError."""
        raise UserError(f"{type(self).__name__} draws, and gives no pictures back")

    def precompute(self, frozen: Params, image: jax.Array) -> dict[str, jax.Array]:
        """{name: array [B, ...]}: what `losses` takes from a batch in place of its pictures (float [B, H, W, C] in [-1, 1]),
        the same at every step, so that it can be kept in files; {} where it needs the pictures. What it is hangs on the
        field `codec` alone and on that one's frozen weights."""
        return {}

    def trace(
        self,
        params: Params,
        frozen: Params,
        text: TextFeatures,
        null_text: TextFeatures,
        key: jax.Array,
        settings: SampleSettings,
        frames: int,
    ) -> jax.Array:
        """uint8 [frames, B, H, W, C]: how the pictures of `sample` come about; where the family works in steps the last
        frame is `sample`'s picture."""
        ...

    def flops(self, shapes: Shapes, tokens: int) -> float:
        """Floating point operations (two a multiply-add) to draw one image in one pass of the network."""
        ...

    def train_flops(self, shapes: Shapes, tokens: int) -> float:
        """Those of one image in one training step: a forward pass and a backward pass of twice its work."""
        return 3.0 * self.flops(shapes, tokens)

    def resolve(self) -> Self:
        """This configuration with what it reads from files it names; called once, before anything else. Raises UserError."""
        return self

    def to_draw(self) -> Self:
        """This configuration without what only training uses (a teacher): what is drawn with and exported."""
        return self

    def init_frozen(self, shapes: Shapes) -> Params:
        """The parameters of what is used but not trained (an autoencoder), fresh and meaningless: for their shapes."""
        return {}

    def load_frozen(self) -> Params:
        """The same from the files that the configuration names, float32. Raises UserError."""
        return {}


class OnePass(Family, Protocol):
    """What makes a picture of noise in one pass of its network: num_steps means nothing to it, and `temperature` scales the
    noise."""

    samplers: ClassVar = ("direct",)

    def noise_shape(self, image: tuple[int, int, int]) -> tuple[int, ...]:
        """Of the noise that a picture of shape [H, W, C] is made of."""
        ...

    def from_noise(
        self, params: Params, frozen: Params, text: TextFeatures, settings: SampleSettings, begin: jax.Array
    ) -> jax.Array:
        """uint8 [B, H, W, C]: what is made of the noise `begin`, float32 [B, *noise_shape]."""
        ...

    def sample(
        self,
        params: Params,
        frozen: Params,
        text: TextFeatures,
        null_text: TextFeatures,
        key: jax.Array,
        settings: SampleSettings,
    ) -> jax.Array:
        """uint8 [B, H, W, C]; see Family.sample."""
        begin = noise(key, self.noise_shape(settings.image))
        return self.from_noise(params, frozen, text, settings, settings.temperature * begin)

    def trace(
        self,
        params: Params,
        frozen: Params,
        text: TextFeatures,
        null_text: TextFeatures,
        key: jax.Array,
        settings: SampleSettings,
        frames: int,
    ) -> jax.Array:
        """uint8 [frames, B, H, W, C]: the noise goes once round a circle through that of `sample`, where it ends."""
        shape = self.noise_shape(settings.image)
        own, other = noise(key, shape), noise(jax.vmap(lambda k: jax.random.fold_in(k, 1))(key), shape)

        def frame(angle: jax.Array) -> jax.Array:
            begin = jnp.cos(angle) * own + jnp.sin(angle) * other
            return self.from_noise(params, frozen, text, settings, settings.temperature * begin)

        return jax.lax.map(frame, circle(frames))


def served(family: Family, usual: Shapes, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those of `sizes` (height, width) in which parameters for pictures of the usual shape can draw.

    Raises UserError, with a reason, where that is the usual one alone and others are asked for."""
    if set(sizes) <= {usual.image[:2]}:
        return list(sizes)
    init = lambda size: jax.eval_shape(  # noqa: E731
        lambda: family.init(jax.random.key(0), usual._replace(image=(*size, usual.image[2])))
    )
    own, found, why = init(usual.image[:2]), [], ""
    for size in sizes:
        try:
            if init(size) == own:
                found.append(size)
            else:
                why = f"this network's weights are made for {usual.image[0]} x {usual.image[1]} alone"
        except UserError as error:
            why = str(error)
    if why and set(found) <= {usual.image[:2]}:
        raise UserError(f"no pictures of other proportions: {why}")
    return found


def to_uint8(image: jax.Array) -> jax.Array:
    """float in [-1, 1], clipped -> uint8, as families give pictures."""
    return jnp.round((jnp.clip(image, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def circle(frames: int) -> jax.Array:
    """float32 [frames]: angles once round, evenly, of which 0 is the last: for a trace that ends where it began."""
    return 2 * jnp.pi / frames * (jnp.arange(frames) + 1 - frames)


def noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal float32 [B, *shape], a row from each key of `key` [B]."""
    return jax.vmap(lambda k: jax.random.normal(k, shape))(key)
