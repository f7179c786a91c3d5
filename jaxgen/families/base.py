"""What every family of generators offers; nothing outside this room asks which family it is."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import jax

from jaxgen.nn.module import Params
from jaxgen.text.features import TextFeatures


class Shapes(NamedTuple):
    """What a network must know of its data: image (H, W, C) and the widths of the text features."""

    image: tuple[int, int, int]
    hidden: int
    pooled: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampleSettings:
    """What to draw, and how. All numbers are traced: new values never recompile."""

    image: tuple[int, int, int] = field(metadata={"static": True})  # H, W, C
    sampler: str = field(default="heun", metadata={"static": True})
    num_steps: jax.Array | int = 20
    guidance_scale: jax.Array | float = 3.0  # 1 is no guidance
    guidance_low: jax.Array | float = 0.0  # guidance acts while low <= t <= high (arXiv 2404.07724)
    guidance_high: jax.Array | float = 1.0


class Family(Protocol):
    """A frozen config dataclass with these methods.

    `params` is {group: tree}: the step takes the gradient of each group's loss for that group's parameters alone, in
    the order `losses` gives them."""

    def init(self, key: jax.Array, shapes: Shapes) -> Params:
        """Fresh float32 parameters."""
        ...

    def logical_axes(self, shapes: Shapes) -> Params:
        """The tree of `init` with logical axis names in each array's place."""
        ...

    def losses(
        self, params: Params, frozen: Params, batch: dict[str, Any], key: jax.Array
    ) -> dict[str, tuple[jax.Array, dict[str, jax.Array]]]:
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

    def flops(self, shapes: Shapes, tokens: int) -> float:
        """Floating point operations (two a multiply-add) of one forward pass for one image."""
        ...
