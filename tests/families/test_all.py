"""What every family owes to the rest of the house: the real step on a mesh, exact resume, pictures that stand alone."""

import ast
import dataclasses
import functools
import re
import tokenize
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import config as configs
from jaxgen.errors import UserError
from jaxgen.families import DDPM, DMD, Adversarial, Autoencoder, Autoregressive, Family, Flow, Gan, OneStep, Vae
from jaxgen.families.autoencoder import KL, Convolutional
from jaxgen.families.base import SampleSettings, Shapes, served
from jaxgen.families.codec import Pretrained
from jaxgen.families.fsq import FSQ
from jaxgen.families.gan_networks import Residual
from jaxgen.families.palette import Palette
from jaxgen.families.transformer import TokenTransformer
from jaxgen.families.unet import UNet
from jaxgen.families.vae_networks import Ladder
from jaxgen.nn.module import flatten, unflatten
from jaxgen.parallel.mesh import MeshConfig, batch_sharding, make_mesh, on_mesh, replicated
from jaxgen.storage import as_path
from jaxgen.text.features import TextFeatures
from jaxgen.train.checkpoints import Checkpoints
from jaxgen.train.state import create, shardings
from jaxgen.train.step import make_step

ROOT = Path(__file__).parents[2]
SHAPES = Shapes((8, 8, 3), 12, 10)
ROWS = 8

UNET = UNet(patch=2, widths=(8,), down=(1,), up=(0,), attention=("joint",), head_dim=8, refiner=0)
TOKENS = TokenTransformer(width=8, depth=1, head_dim=4, mlp_ratio=2, refiner=0)
CODE = {"widths": (8,), "encoder_blocks": 1, "decoder_blocks": 1}
RESIDUAL = Residual(
    noise=6, widths=(8,), blocks=(1,), attention=("text",), seen_widths=(8,), seen_blocks=(1,), judge_width=8,
    judge_blocks=1, head_dim=8, refiner=0,
)  # fmt: skip
LADDER = Ladder(
    strides=(2, 4), widths=(8, 8), down=(1, 1), up=(1, 1), groups=(1, 1), channels=2, attention=("none", "text"),
    head_dim=8, refiner=0,
)  # fmt: skip
# The smallest of each, as what takes long is to compile them; where a family has several forms, the one with more parts.
FAMILIES = {
    "flow": Flow(network=UNET, codec=Pretrained("somewhere", Convolutional(**CODE, bottleneck=KL(3)))),
    "ddpm": DDPM(network=UNET),
    "onestep": OneStep(network=UNET, teacher="somewhere", teacher_flow=Flow(network=UNET)),
    "dmd": DMD(network=UNET, teacher="somewhere", teacher_flow=Flow(network=UNET), score_rate=1.0),
    "adversarial": Adversarial(network=UNET, judge=Gan(network=RESIDUAL, penalty_every=2)),
    "gan": Gan(network=RESIDUAL, penalty_every=2),
    "vae": Vae(network=LADDER),
    "raster": Autoregressive(Pretrained("somewhere", Convolutional(**CODE, patch=4, bottleneck=FSQ((3, 3)))), TOKENS),
    "masked": Autoregressive(Palette(3), TOKENS, order="masked"),
    "autoencoder": Autoencoder(
        network=Convolutional(**CODE), adversarial=0.1, adversarial_loss="nonsaturating", discriminator_widths=(8,)
    ),
}
SAMPLERS = {"flow": "euler", "ddpm": "ddpm"}  # the one of fewer passes, the one that draws at random in every step
each = pytest.mark.parametrize("name", FAMILIES)
drawing = pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.draws])


def text(batch=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    hidden, pooled = (rng.normal(size=(batch, *shape)).astype(np.float32) for shape in ((6, 12), (10,)))
    return TextFeatures(hidden, pooled, np.arange(6) < rng.integers(2, 7, (batch, 1)))


def batch(step):
    image = np.random.default_rng(step).integers(0, 256, (ROWS, *SHAPES.image), dtype=np.uint8)
    return {"image": image, "text": text(seed=step)}


def random_like(tree, seed=0):
    """Every weight random, also those that start at zero, so that nothing is invisible to a test."""
    rng = np.random.default_rng(seed)

    def draw(name, leaf):
        if leaf.dtype != jnp.float32:
            return np.ones(leaf.shape, leaf.dtype)
        spread = 0.2 if leaf.ndim <= 1 else 0.7 / np.sqrt(np.prod(leaf.shape[:-1]))
        middle = 1.0 if name.endswith(".scale") else 0.0
        return (middle + spread * rng.normal(size=leaf.shape)).astype(np.float32)

    return unflatten({name: draw(name, leaf) for name, leaf in flatten(tree)})


class Run:
    """The one training step of a family on a mesh, as a run makes it: compiled once, its state donated."""

    def __init__(self, family, sizes):
        # Linear in the gradient: Adam would make a whole step of the rounding of one that is 0.
        optimizers = {group: optax.sgd(0.1, momentum=0.9) for group in family.groups}
        mesh = make_mesh(sizes, jax.devices()[: sizes.data * sizes.fsdp * sizes.tensor])
        abstract = jax.eval_shape(lambda: create(family, SHAPES, optimizers, seed=0))
        self.where = shardings(abstract, family.logical_axes(SHAPES), mesh)
        self.abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, self.where)
        self.frozen = random_like(jax.eval_shape(lambda: family.init_frozen(SHAPES)), seed=1)
        self.place = batch_sharding(mesh)
        self.step = jax.jit(
            on_mesh(mesh, make_step(family, optimizers, seed=0)), donate_argnums=0, out_shardings=(self.where, replicated(mesh))
        )

    def begin(self):
        params = random_like(self.abstract.params)
        zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), self.abstract)
        average = {group: params[group] for group in self.abstract.ema_params}
        control = {"failed": np.int32(-1)}
        state = dataclasses.replace(zeros, params=params, ema_params=average, control=control)
        return jax.device_put(state, self.where)

    def go_on(self, state, until):
        """(the state after step `until`, as it lies; the metrics of each step)."""
        seen = []
        for step in range(int(state.step), until):
            state, metrics = self.step(state, self.frozen, jax.device_put(batch(step), self.place))
            seen.append(jax.device_get(metrics))
        return state, seen


@functools.cache
def on_a_mesh(name):
    return Run(FAMILIES[name], MeshConfig(2, 2, 2))


@each
def test_a_mesh_changes_nothing(name):
    run, alone = on_a_mesh(name), Run(FAMILIES[name], MeshConfig(1, 1, 1))
    begun = jax.device_get(run.begin())
    (state, seen), (other, other_seen) = (r.go_on(r.begin(), 2) for r in (run, alone))
    split = {axis for leaf in jax.tree.leaves(state.params) for axis in leaf.sharding.spec}
    assert split & {"fsdp", "tensor"}
    for ours, theirs in zip(seen, other_seen, strict=True):
        assert ours["failed"] == -1
        assert ours.keys() == theirs.keys()
        for metric in ours:
            np.testing.assert_allclose(ours[metric], theirs[metric], rtol=1e-5, atol=1e-6, err_msg=metric)
    state, other = jax.device_get((state, other))
    for ours, theirs, before in (
        (state.params, other.params, begun.params),
        (state.ema_params, other.ema_params, begun.ema_params),
    ):
        for (path, a), (_, b), (_, c) in zip(*map(flatten, (ours, theirs, before)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5, err_msg=path)
            assert (a != c).any(), f"{path} is not trained"


@each
def test_a_run_goes_on_exactly(name, tmp_path):
    run = on_a_mesh(name)
    whole, seen = run.go_on(run.begin(), 4)
    half, first = run.go_on(run.begin(), 2)
    checkpoints = Checkpoints(as_path(tmp_path))
    checkpoints.save(half, {})
    checkpoints.close()
    restored, meta = Checkpoints(as_path(tmp_path), keep=None).restore(run.abstract)
    assert (int(restored.step), meta["step"]) == (2, 2)
    ended, second = run.go_on(restored, 4)
    assert first + second == seen
    assert run.step._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(ended), jax.device_get(whole))


@drawing
def test_a_picture_stands_alone_and_ends_its_trace(name):
    family = FAMILIES[name].to_draw()
    params = random_like(jax.eval_shape(lambda: family.init(jax.random.key(0), SHAPES)))
    frozen = random_like(jax.eval_shape(lambda: family.init_frozen(SHAPES)), seed=1)
    params, frozen = jax.device_put(({group: params[group] for group in family.drawn}, frozen))
    settings = SampleSettings(SHAPES.image, SAMPLERS.get(name, family.samplers[0]), num_steps=3)

    def both(settings, words, null, keys):
        inputs = params, frozen, words, null, keys, settings
        return family.sample(*inputs), family.trace(*inputs, 2)

    draw = jax.jit(functools.partial(both, settings))
    words, null, keys = text(4), text(4, seed=9), jax.random.split(jax.random.key(0), 4)
    pictures, frames = (np.asarray(a, int) for a in draw(words, null, keys))
    assert frames.shape == (2, *pictures.shape) == (2, 4, *SHAPES.image)
    assert np.abs(frames[-1] - pictures).max() <= 1
    assert (frames[0] != pictures).any()
    # The same two in other company and at other places.
    company = lambda a, b: np.concatenate([b[:2], a[1:2], a[:1]])  # noqa: E731
    others = (jax.tree.map(company, a, b) for a, b in ((words, text(4, seed=5)), (null, text(4, seed=6))))
    crowd = jnp.concatenate([jax.random.split(jax.random.key(1), 2), keys[1::-1]])
    again = np.asarray(draw(*others, crowd)[0], int)
    assert np.abs(again[:1:-1] - pictures[:2]).max() <= 1
    assert (again[0] != pictures[0]).any()
    # All numbers can be traced, so that others do not compile anew.
    assert [a.shape for a in jax.eval_shape(both, settings, words, null, keys)] == [pictures.shape, frames.shape]


@each
def test_other_shapes_are_learned_and_drawn_or_refused(name):
    family, size = FAMILIES[name], (8, 16)
    if name in ("adversarial", "gan", "vae", "raster", "masked"):  # places have weights of their own
        with pytest.raises(UserError, match=r"this network's weights are made for 8 x 8 alone"):
            served(family, SHAPES, [(8, 8), size])
        return
    assert served(family, SHAPES, [(8, 8), size, (7, 9)]) == [(8, 8), size]
    with pytest.raises(UserError, match=r"no pictures of other proportions: .*image_size=7 is no multiple of"):
        served(family, SHAPES, [(8, 8), (7, 9)])
    shape = (*size, 3)
    image = jax.random.uniform(jax.random.key(3), (4, *shape), minval=-1, maxval=1)
    params = random_like(jax.eval_shape(lambda: family.init(jax.random.key(0), SHAPES)))
    frozen = random_like(jax.eval_shape(lambda: family.init_frozen(SHAPES)), seed=1)
    learn = lambda image: family.losses(params, frozen, {"image": image, "text": text(4)}, jax.random.key(0))  # noqa: E731
    learned = jax.jit(learn)(image)
    assert all(np.isfinite(loss) for loss, _ in learned.values())
    if family.draws:
        family = family.to_draw()
        drawn = {group: params[group] for group in family.drawn}
        settings = SampleSettings(shape, SAMPLERS.get(name, family.samplers[0]), num_steps=1)
        keys = jax.random.split(jax.random.key(0), 4)
        found = jax.eval_shape(lambda: family.sample(drawn, frozen, text(4), text(4, seed=9), keys, settings))
        assert found.shape == (4, *shape)


@each
def test_logical_axes_are_those_of_the_parameters(name):
    family = FAMILIES[name]
    params = jax.eval_shape(lambda: family.init(jax.random.key(0), SHAPES))
    axes = dict(flatten(family.logical_axes(SHAPES)))
    assert {path: leaf.ndim for path, leaf in flatten(params)} == {path: len(names) for path, names in axes.items()}
    assert set(family.drawn) <= set(family.groups) == params.keys()


def registered():
    return {name: kind for name, kind in configs._TYPES.items() if Family in kind.__mro__}


def test_every_family_is_here_and_its_section_survives_json():
    assert {type(family) for family in FAMILIES.values()} == set(registered().values())
    for family in FAMILIES.values():
        assert configs.from_dict(Family, configs.to_dict(family.to_draw())) == family.to_draw()


def test_nothing_else_names_a_family():
    names = {*registered(), *(kind.__name__.lower() for kind in registered().values())}
    files = [*(ROOT / "jaxgen").rglob("*.py"), ROOT / "train.py", ROOT / "sample.py"]
    for file in (file for file in files if ROOT / "jaxgen" / "families" not in file.parents):
        with tokenize.open(file) as lines:
            words = {token.string for token in tokenize.generate_tokens(lines.readline) if token.type == tokenize.NAME}
        parts = {part.lower() for word in words for part in [word, *re.findall("[A-Z]?[a-z]+|[A-Z]+", word)]}
        assert not parts & names, file
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxgen.families"):
                assert node.module == "jaxgen.families.base", file
            if isinstance(node, ast.Constant) and node.value in names:
                assert (file.name, node.value) == ("sample.py", "flow"), file  # a model that ships
