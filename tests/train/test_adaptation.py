"""The text encoder trained with the generator: which arrays move, where they lie, and whole runs with each method."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

import jaxgen
from jaxgen.nn.module import bind, flatten, init_params, logical_axes
from jaxgen.parallel.mesh import MeshConfig, batch_sharding, make_mesh, param_shardings, replicated
from jaxgen.text import adapt, bert
from jaxgen.text.adapt import AdaLoRA, Bottleneck, Frozen, Full, LastLayers, LoRA, Prefix, select, text_of, with_text
from jaxgen.text.config import TextConfig
from jaxgen.text.features import TextFeatures
from jaxgen.text.peft import load_adapter, save_adapter
from jaxgen.train.optimizers import OptimizerConfig, make_optimizer
from jaxgen.train.state import create, shardings
from jaxgen.train.step import make_step
from tests.train.test_start import begin, place, saved  # noqa: F401
from tests.train.test_step import SHAPES, largest, make_batch
from tests.train.toy import Toy

METHODS = [
    Full(),
    LastLayers(1),
    LoRA(4),
    AdaLoRA(4, target_rank=2, warmup_steps=1, final_steps=1, every=1, targets=("q", "v")),
    Bottleneck(4),
    Prefix(2),
]
named = lambda method: type(method).__name__  # noqa: E731


@pytest.fixture(scope="module", autouse=True)
def quick():
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is what takes long here
    yield
    jax.config.update("jax_disable_most_optimizations", False)


SHAPE = bert.BertConfig(
    vocab_size=2000, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, max_position_embeddings=16
)


def encode(params, ids, mask):
    module = bind(adapt.fitted(SHAPE, params).build, params)
    _, last = module(ids, mask, jnp.float32)
    return TextFeatures(jnp.tile(last, (1, 1, 2))[..., :12], module.pool(last, ids, mask), mask > 0)


def prepared(method, mesh_config=None, name="adamw", steps=10, family=None, eps=1e-8, **settings):
    """(state, step, frozen, mesh): a toy family with its text encoder, laid out over a mesh."""
    family = family or Toy(second=True)
    mesh_config = mesh_config or MeshConfig(1, 1, 1)
    mesh = make_mesh(mesh_config, jax.devices()[: mesh_config.data * mesh_config.fsdp * mesh_config.tensor])
    base = init_params(SHAPE.build, jax.random.key(3))
    base = jax.device_put(base, param_shardings(mesh, logical_axes(SHAPE.build), base))
    config = OptimizerConfig(name=name, learning_rate=1e-2, warmup_steps=0, schedule="constant", eps=eps)
    groups = jax.eval_shape(lambda: family.init(jax.random.key(0), SHAPES))
    optimizers = {group: make_optimizer(config, steps, mesh, TextConfig(adapt=method)) for group in groups}

    def make(base):
        return create(family, SHAPES, optimizers, 0, lambda key: method.init(key, base, SHAPE))

    axes = with_text(family.logical_axes(SHAPES), method.axes(SHAPE), family.drawn[0])
    where = shardings(jax.eval_shape(make, base), axes, mesh)
    state = jax.jit(make, out_shardings=where)(base)
    own = dict(flatten(text_of(state.params)))
    frozen = {"text": select(base, lambda name: name not in own)}
    step = make_step(family, optimizers, seed=0, encode=encode, adapt=method, **settings)
    return state, jax.jit(step, out_shardings=(where, replicated(mesh))), frozen, mesh


def tokens(mesh, size=16, seed=0):
    rng = np.random.default_rng(seed)
    ids, mask = rng.integers(0, 2000, (size, 6)).astype(np.int32), np.ones((size, 6), np.int32)
    batch = {"image": make_batch(size, seed)["image"], "input_ids": ids, "attention_mask": mask}
    return jax.device_put(batch, batch_sharding(mesh))


def after(method, mesh_config=None, steps=2, **settings):
    state, step, frozen, mesh = prepared(method, mesh_config, **settings)
    for i in range(steps):
        state, metrics = step(state, frozen, tokens(mesh, seed=i))
    return jax.device_get(state), jax.device_get(metrics)


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_a_mesh_changes_nothing(method):
    state, metrics = after(method, eps=1e-4)  # else AdamW makes steps of the rounding of gradients that are zero
    for settings in ({"mesh_config": MeshConfig(8, 1, 1)}, {"mesh_config": MeshConfig(2, 2, 2)}):
        other, values = after(method, eps=1e-4, **settings)
        np.testing.assert_allclose(metrics["loss"], values["loss"], rtol=1e-5)
        assert largest(state.params, other.params) <= 2e-6


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_only_what_is_trained_takes_memory_and_moves(method):
    state, step, frozen, mesh = prepared(method)
    trained = dict(flatten(text_of(state.params)))
    assert trained.keys().isdisjoint(dict(flatten(frozen["text"])))
    size = sum(leaf.size for leaf in trained.values())
    plain = prepared(Frozen())[0]
    floats = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree) if leaf.dtype == jnp.float32)  # noqa: E731
    assert floats(state.params) - floats(plain.params) == size
    assert floats(state.ema_params) - floats(plain.ema_params) == size
    more = (
        2 * size + sum(leaf.size for name, leaf in trained.items() if name.endswith(".e")) if named(method) == "AdaLoRA" else 0
    )
    assert floats(state.opt_state) - floats(plain.opt_state) == 2 * size + more  # AdaLoRA keeps each weight's importance
    table = 2000 * 8
    if not isinstance(method, Full):
        assert all(leaf.size < table for leaf in jax.tree.leaves((state.params, state.opt_state)))
    assert all(np.size(c) < 1000 for c in jax.make_jaxpr(step)(state, frozen, tokens(mesh)).consts)
    program = step.lower(state, frozen, tokens(mesh)).compile().as_text()
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"= \w+\[([\d,]+)\]\S* constant\(", program)]
    assert max(sizes, default=0) < 1000
    new = state
    for i in range(3):  # in the first one LoRA's b alone has a gradient
        new, _ = step(new, frozen, tokens(mesh, seed=i))
    old, now = dict(flatten(text_of(state.params))), dict(flatten(text_of(new.params)))
    still = {name for name in old if float(jnp.abs(now[name] - old[name]).max()) == 0}
    assert still <= {name for name in old if name.endswith("k.bias")}
    assert largest(new.params["second"], state.params["second"]) > 0


def test_other_groups_give_the_encoder_no_gradient():
    class Loud(Toy):
        def losses(self, params, frozen, batch, key):
            losses = super().losses(params, frozen, batch, key)
            loss, metrics = losses["second"]
            return losses | {"second": (loss + self.weight * jnp.sum(batch["text"].pooled ** 2), metrics)}

    Loud.weight = 0.0
    quiet, _ = after(LoRA(4), family=Loud(second=True))
    Loud.weight = 100.0
    loud, _ = after(LoRA(4), family=Loud(second=True))
    assert largest(quiet.params["first"], loud.params["first"]) == 0


def test_a_step_is_the_gradient_of_the_merged_encoder():
    """By hand: one AdamW step of a fresh LoRA moves b by its rate against the gradient's sign, and a by nothing."""
    method = LoRA(4)
    state, step, frozen, mesh = prepared(method, family=Toy())
    batch = tokens(mesh)
    new, metrics = step(state, frozen, batch)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 1), 0)

    def loss(trained):
        text = encode(method.merge(frozen["text"], trained), batch["input_ids"], batch["attention_mask"])
        image = batch["image"] / 127.5 - 1
        return Toy().losses(state.params, {}, {"image": image, "text": text}, key)["first"][0]

    value, grads = jax.value_and_grad(loss)(text_of(state.params))
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    old, now = dict(flatten(text_of(state.params))), dict(flatten(text_of(new.params)))
    for name, gradient in flatten(grads):
        if name.endswith(".b"):
            sure = np.abs(gradient) > 1e-6
            assert sure.any()
            np.testing.assert_allclose((now[name] - old[name])[sure], -1e-3 * np.sign(gradient)[sure], rtol=1e-2)


def test_the_text_has_its_own_rate_and_muon_leaves_it_alone():
    for name in ("adamw", "muon"):
        state, step, frozen, mesh = prepared(Full(), name=name, family=Toy())
        new, _ = step(state, frozen, tokens(mesh))
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), new.params, state.params)["first"]
        assert 0.9e-3 < max(jax.tree.leaves(moved["text"])) < 1.2e-3  # a tenth of the generator's 1e-2
        assert moved["w"] > 3e-3


def test_accumulation_encodes_each_part_in_turn():
    class Still(Toy):
        def losses(self, params, frozen, batch, key):
            return super().losses(params, frozen, batch, jax.random.key(0)) | {
                "first": (jnp.mean((batch["text"].pooled @ params["first"]["w"]) ** 2), {})
            }

    whole, _ = after(LoRA(4), family=Still(), eps=1e-4)
    parts, _ = after(LoRA(4), family=Still(), eps=1e-4, accumulate=4)
    assert largest(text_of(whole.params), text_of(parts.params)) <= 2e-6


OVERRIDES = {
    "full": [],
    "last_layers": [],
    "lora": ["rank=4"],
    "adalora": ["rank=4", "target_rank=2", "warmup_steps=1", "final_steps=1", "every=1"],
    "bottleneck": ["size=4"],
    "prefix": ["count=2"],
}


@pytest.mark.parametrize("method", OVERRIDES)
def test_a_whole_run_with_each_method(place, method):  # noqa: F811
    more = [f"--config.text.adapt={method}", *(f"--config.text.adapt.{o}" for o in OVERRIDES[method])]
    more += ["--config.train.steps=4", "--config.train.checkpoint_every=2"]
    status, out, err = begin(place, method, *more)
    assert status == 0, err
    assert saved(place / method) == [2, 4]

    # What lies in a checkpoint: of the text encoder what is trained, and no more.
    step = place / method / "checkpoints" / "4"
    names = {n for n, _ in flatten(ocp.StandardCheckpointer().restore(step / "params")) if n.startswith("generator.text.")}
    model = jaxgen.load(str(place / method))
    trained = dict(flatten(text_of(model.params)))
    assert names == {f"generator.text.{name}" for name in trained} != set()
    base = model.encoder.pretrained
    if method != "full":
        assert sum(file.stat().st_size for file in step.rglob("*")) < 30522 * 8 * 4  # the embedding table's size
    start = dict(flatten(model.config.text.adapt.init(jax.random.key(0), base.params, base.architecture)))
    assert any((np.asarray(trained[name]) != np.asarray(start[name])).any() for name in trained)

    # The same command goes on where a run was broken off, bit for bit.
    shutil.copytree(place / method, place / f"{method}_again")
    shutil.rmtree(place / f"{method}_again" / "checkpoints" / "4")
    status, out, err = begin(place, f"{method}_again", *more)
    assert status == 0, err
    assert "from step 2 to 4" in out
    whole, again = (dict(flatten(jaxgen.load(str(place / name)).params)) for name in (method, f"{method}_again"))
    assert all((np.asarray(whole[name]) == np.asarray(again[name])).all() for name in whole)
    losses = [
        {
            e["step"]: e["loss"]
            for e in map(json.loads, (place / name / "metrics.jsonl").read_text().splitlines())
            if "loss" in e
        }
        for name in (method, f"{method}_again")
    ]
    assert losses[0] == losses[1]
    assert sorted(losses[0]) == [1, 2, 3, 4]

    # Exported, loaded, drawn with: the same pictures; and the adapted encoder is not the plain one.
    jaxgen.export(str(place / method), str(place / f"{method}_out"), dtype="float32")
    other = jaxgen.load(str(place / f"{method}_out"))
    file = load_file(place / f"{method}_out" / "model.safetensors")
    assert {name for name in file if name.startswith("generator.text.")} == names
    np.testing.assert_array_equal(*(m.sample(["grey number 3"], num_steps=2) for m in (model, other)))
    features = [e(["grey number 3"]).hidden for e in (model.encoder, other.encoder, unadapted(model))]
    np.testing.assert_array_equal(features[0], features[1])
    assert float(jnp.abs(features[0] - features[2]).max()) > 0

    # The adapter alone.
    save_adapter(text_of(model.params), model.config.text.adapt, base, place / f"{method}_adapter")
    plain = jaxgen.text.load_text_encoder(str(place / "encoder"))
    own = adapt.adapted(plain, *load_adapter(place / f"{method}_adapter", plain.pretrained))
    np.testing.assert_allclose(own(["grey number 3"]).hidden, features[0], atol=1e-6)


def unadapted(model):
    """The model's encoder as it was read."""
    return jaxgen.text.load_text_encoder(model.config.text.source)


MESH = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]


def test_evaluation_while_training_sees_the_average(place):  # noqa: F811
    more = ["--config.text.adapt=lora", "--config.train.steps=2", "--config.eval.every=2", "--config.eval.count=4"]
    more += ["--config.sample.prompts=grey", "--config.sample.every=2", "--config.sample.num_steps=1"]
    status, _, err = begin(place, "evaluated", *more, "--config.optimizer.name=muon", *MESH)
    assert status == 0, err
    assert (place / "evaluated" / "samples" / "step_0000002.png").exists()
    assert "eval/loss" in (place / "evaluated" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["text.adapt=lora", "text.adapt.targets=query"], "no layer 'query'; it has"),
        (["text.adapt=last_layers", "text.adapt.count=2"], "text.adapt.count=2: this text encoder has 1 layers"),
        (["text.adapt=adalora"], "leave none of train.steps=12"),
        (["text.adapt=lora", "text.in_step=False"], "text.in_step=False"),
        (["text.adapt=dora"], "not frozen or last_layers or full or lora or adalora or bottleneck or prefix"),
    ],
)
def test_mistakes_end_with_one_line(place, overrides, message):  # noqa: F811
    status, _, err = begin(place, "mistake", *(f"--config.{o}" for o in overrides))
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert not (place / "mistake" / "config.json").exists()
