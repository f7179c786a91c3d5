"""What each way of adapting trains and computes, on the tiny models of cases.py; PEFT's files by the peft package itself."""

import dataclasses
import functools
import json
import shutil
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from jaxgen.config import finalize
from jaxgen.errors import UserError
from jaxgen.families.base import Shapes
from jaxgen.families.flow import Flow
from jaxgen.families.transformer import Transformer
from jaxgen.nn.module import bind, flatten, logical_axes
from jaxgen.text import adapt, registry
from jaxgen.text.adapt import AdaLoRA, Bottleneck, Frozen, Full, LastLayers, LoRA, Prefix
from jaxgen.text.bert import BertConfig
from jaxgen.text.config import TextConfig
from jaxgen.text.encoder import load_pretrained, save_pretrained
from jaxgen.text.peft import load_adapter, save_adapter
from jaxgen.text.weights import Tensor
from tests.text.cases import REFERENCES, Case

METHODS = [Full(), LastLayers(1), LoRA(4), AdaLoRA(6, target_rank=3), Bottleneck(4), Prefix(3)]
ids = lambda method: type(method).__name__  # noqa: E731


def load(name, directory):
    case = Case(name)
    directory.mkdir(parents=True, exist_ok=True)
    case.write(directory)
    stored = case.stored
    return load_pretrained(str(directory)), jnp.asarray(stored["ids"]), jnp.asarray(stored["mask"])


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return load("bert", tmp_path_factory.mktemp("models") / "bert")


@functools.partial(jax.jit, static_argnums=0)
def run(architecture, params, tokens, mask):
    return bind(architecture.build, params)(tokens, mask, jnp.float32)[1]


def states(model, params, tokens, mask):
    return run(adapt.fitted(model.architecture, params), params, tokens, mask)


def moved(trained, by=0.1):
    """`trained` away from where it starts, so that every array has an effect."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf + by * rng.normal(size=leaf.shape), jnp.float32), jax.device_get(trained))


def flat(tree):
    return {name: np.asarray(leaf) for name, leaf in flatten(tree)}


def same(a, b):
    a, b = flat(a), flat(b)
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_what_is_trained_has_a_gradient_and_starts_as_the_model(bert, method):
    model, tokens, mask = bert
    trained = method.init(jax.random.key(0), model.params, model.architecture)
    assert {leaf.dtype for leaf in flat(trained).values()} == {np.dtype(np.float32)}
    axes = dict(flatten(method.axes(model.architecture)))
    assert {name: len(names) for name, names in axes.items()} == {name: leaf.ndim for name, leaf in flat(trained).items()}
    frozen = adapt.select(model.params, lambda name: name not in flat(trained))

    def run(frozen, trained):
        """Not compiled as a whole, so that what adds nothing rounds nothing."""
        params = method.merge(frozen, trained)
        return bind(adapt.fitted(model.architecture, params).build, params)(tokens, mask, jnp.float32)[1]

    if not isinstance(method, Prefix):  # which every query sees from the start
        np.testing.assert_array_equal(run(frozen, trained), run(model.params, {}))
    goal = np.random.default_rng(2).normal(size=(*tokens.shape, model.architecture.hidden_size)).astype(np.float32)
    loss = lambda trained: jnp.sum(goal * run(frozen, trained) * (mask > 0)[..., None])  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(moved(trained))
    still = {name for name, leaf in flat(gradient).items() if np.abs(leaf).max() < 1e-4}
    # A key's bias adds the same to every logit of a query.
    assert still == {name for name in flat(trained) if name.endswith(".k.bias")}


def test_each_method_trains_what_it_says(bert):
    model, *_ = bert
    names = {ids(m): set(flat(m.init(jax.random.key(0), model.params, model.architecture))) for m in METHODS}
    assert names["Full"] == set(flat(model.params))
    assert names["LastLayers"] == {name for name in flat(model.params) if name.startswith("layers.1.")}
    kernels = [f"layers.{i}.{layer}.kernel" for i in (0, 1) for layer in ("q", "v")]
    assert names["LoRA"] == {f"{kernel}.{factor}" for kernel in kernels for factor in "ab"}
    assert len(names["AdaLoRA"]) == 2 * 6 * 3
    assert {name.split(".")[2] for name in names["Bottleneck"]} == {"adapter1", "adapter2"}
    assert names["Prefix"] == {f"layers.{i}.prefix.{which}" for i in (0, 1) for which in "kv"}
    assert Frozen().init(jax.random.key(0), model.params, None) == {}


# Every kind of layer; other cases differ in what does not concern additions to one (rotary positions, pooling).
LAYERS = ["distilbert", "clip_bigg", "gpt2", "t5", "t5_v11", "umt5"]
LAYERS += ["gemma2_uncapped", "gemma3_parameters", "llama_bias", "qwen3_sliding", "smollm3_sliding"]


def test_no_architecture_is_left_out():
    kinds = {json.loads(str(Case(name).stored["config"]))["model_type"] for name in LAYERS}
    assert {registry.ARCHITECTURES[kind] for kind in kinds} == set(registry.ARCHITECTURES.values())


@pytest.mark.parametrize("name", LAYERS)
def test_every_architecture_can_be_adapted(name, tmp_path):
    model, tokens, mask = load(name, tmp_path)
    plain = states(model, model.params, tokens, mask)
    scale = float(jnp.abs(plain).max())
    for method in (LoRA(2, targets=("all",)), Bottleneck(2), Prefix(2), LastLayers(1)):
        trained = method.init(jax.random.key(0), model.params, model.architecture)
        if not isinstance(method, Prefix):
            # Bottlenecks make another program, which rounds otherwise.
            same_program = 0.0 if not isinstance(method, Bottleneck) else 1e-5 * scale
            begun = states(model, method.merge(model.params, trained), tokens, mask)
            np.testing.assert_allclose(begun[mask > 0], plain[mask > 0], rtol=0, atol=same_program)
        changed = states(model, method.merge(model.params, moved(trained, 0.3)), tokens, mask)
        assert float(jnp.abs(changed - plain)[mask > 0].max()) > 1e-3 * scale, method


@pytest.mark.parametrize("method", [LoRA(4, 8.0, ("all",)), LoRA(4, 8.0, rslora=True), AdaLoRA(5)], ids=str)
def test_low_rank_changes_are_merged_as_stated_and_taken_back_exactly(bert, method):
    params = bert[0].params
    trained = moved(method.init(jax.random.key(0), params))
    kept = method.replaced(params, trained)
    assert set(flat(kept)) == set(adapt.targeted(params, method.targets))
    merged = method.merge(params, trained)
    assert same(method.unmerge(merged, kept), params)
    scale = method.alpha / (2.0 if getattr(method, "rslora", False) else method.rank)
    for name, f in adapt.factors_of(trained).items():
        change = np.asarray(f["a"], np.float64) * np.asarray(f.get("e", 1.0)) @ np.asarray(f["b"], np.float64)
        np.testing.assert_allclose(flat(merged)[name], flat(params)[name] + scale * change, atol=1e-5)
    others = flat(params).keys() - flat(kept).keys()
    assert all((flat(merged)[name] == flat(params)[name]).all() for name in others)


def test_the_layers_of_a_generator_take_lora_too():
    family, shapes = Flow(network=Transformer(patch=4, width=32, depth=1, head_dim=8)), Shapes((16, 16, 3), 12, 8)
    rng = np.random.default_rng(0)
    params = jax.eval_shape(lambda: family.init(jax.random.key(0), shapes))["generator"]
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)
    method = LoRA(3, targets=("q", "out", "up"))
    trained = method.init(jax.random.key(1), params)
    axes = dict(flatten(method.axes_of(family.logical_axes(shapes)["generator"])))
    shapes_of = {name: leaf.shape for name, leaf in flat(trained).items()}
    assert shapes_of["blocks.0.attention.q.a"] == (32, 3)
    assert shapes_of["blocks.0.attention.out.a"] == (32, 3)
    assert (axes["blocks.0.attention.q.b"], axes["blocks.0.attention.out.b"]) == ((None, "heads"), (None, "embed"))
    assert {name: len(shape) for name, shape in shapes_of.items()} == {name: len(names) for name, names in axes.items()}
    assert same(method.merge(params, trained), params)
    merged = flat(method.merge(params, moved(trained)))["blocks.0.attention.q"]
    f = adapt.factors_of(moved(trained))["blocks.0.attention.q"]
    change = jnp.einsum("dr,rhk->dhk", f["a"], f["b"].reshape(3, 4, 8)) * method.scale
    np.testing.assert_allclose(merged, params["blocks"]["0"]["attention"]["q"] + change, atol=1e-5)


def test_adalora_cuts_to_its_budget_and_stays_near_orthogonal(bert):
    model, tokens, mask = bert
    steps = 60
    method = AdaLoRA(6, target_rank=2, warmup_steps=10, final_steps=20, every=5, orthogonality=0.5)
    trained = method.init(jax.random.key(0), model.params, model.architecture)
    optimizer = method.optimizer(optax.adam(3e-3), steps)
    goal = states(model, LoRA(3, targets=method.targets).merge(model.params, moved(trained, 0.02)), tokens, mask)

    @jax.jit
    def step(trained, opt_state):
        def loss(trained):
            error = states(model, method.merge(model.params, trained), tokens, mask) - goal
            return jnp.mean(error**2) + method.penalty(trained)

        grads = jax.grad(loss)(trained)
        updates, opt_state = optimizer.update({"text": grads}, opt_state, {"text": trained})
        return optax.apply_updates(trained, updates["text"]), opt_state

    def rank(trained):
        return sum(int((f["e"] != 0).sum()) for f in adapt.factors_of(trained).values())

    opt_state, ranks, penalties = optimizer.init({"text": trained}), [], [float(method.penalty(trained))]
    for _ in range(steps):
        trained, opt_state = step(trained, opt_state)
        ranks.append(rank(trained))
        penalties.append(float(method.penalty(trained)))
    kernels = len(adapt.factors_of(trained))
    assert ranks[9] == 6 * kernels
    at_cuts = ranks[14:40:5]
    assert at_cuts == [int(method.budget(jnp.int32(s), steps, kernels)) for s in range(15, 41, 5)]
    assert at_cuts == sorted(at_cuts, reverse=True)
    assert set(ranks[39:]) == {2 * kernels}  # and nothing comes back at the end
    assert penalties[-1] < 0.2 * penalties[0]
    ema = method.averaged(jax.tree.map(jnp.ones_like, trained), trained)
    assert rank(ema) == 2 * kernels
    # Not the same number everywhere: directions went where they matter.
    assert len({int((f["e"] != 0).sum()) for f in adapt.factors_of(trained).values()}) > 1


PEFT = [name for name in ("bert", "gpt2", "llama_bias") if (REFERENCES / f"peft_{name}").is_dir()]


@pytest.mark.parametrize("name", PEFT)
def test_adapters_of_the_peft_package_load_and_are_written_back(name, tmp_path):
    theirs = REFERENCES / f"peft_{name}"
    model, tokens, mask = load(name, tmp_path / "model")
    method, trained = load_adapter(theirs, model)
    out = states(model, method.merge(model.params, trained), tokens, mask)
    expected, real = np.load(theirs / "last.npy"), np.asarray(mask) > 0
    error = np.abs(np.asarray(out) - expected)[real].max() / np.abs(expected).max()
    assert error <= 1e-5
    plain = states(model, model.params, tokens, mask)
    assert np.abs(np.asarray(plain) - expected)[real].max() / np.abs(expected).max() > 0.01
    save_adapter(trained, method, model, tmp_path / "ours")
    ours, old = load_file(tmp_path / "ours" / "adapter_model.safetensors"), load_file(theirs / "adapter_model.safetensors")
    assert ours.keys() == old.keys()
    config, before = (json.loads((place / "adapter_config.json").read_text()) for place in (tmp_path / "ours", theirs))
    exceptions = before["rank_pattern"]
    for key in old:
        if not any(module in key for module in exceptions):  # there the scale is another number, and b with it
            np.testing.assert_array_equal(ours[key], old[key], err_msg=key)
    known = config.keys() - {"base_model_name_or_path", "target_modules", "rank_pattern", "alpha_pattern"}
    assert {key: config[key] for key in known} == {key: before[key] for key in known}
    if name == "bert":
        assert config["target_modules"] == before["target_modules"] == ["query", "value"]
    again, loaded = load_adapter(tmp_path / "ours", model)
    assert again == method
    assert same(loaded, trained) or exceptions


@pytest.mark.parametrize("method", [*METHODS, LoRA(2, 3.0, ("all",), rslora=True)], ids=ids)
def test_each_method_is_saved_alone_and_read_back(bert, tmp_path, method):
    model, tokens, mask = bert
    trained = moved(method.init(jax.random.key(0), model.params, model.architecture))
    save_adapter(trained, method, model, tmp_path / "adapter")
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again, loaded = load_adapter(tmp_path / "adapter", model)
    if isinstance(method, LoRA | AdaLoRA):
        run = lambda m, t: states(model, m.merge(model.params, t), tokens, mask)  # noqa: E731
        np.testing.assert_array_equal(run(again, loaded), run(method, trained))
    else:
        assert again == method
    assert same(loaded, trained)


def test_adalora_has_the_layout_of_peft(bert, tmp_path):
    model, *_ = bert
    method = AdaLoRA(6, target_rank=3, targets=("q",))
    save_adapter(method.init(jax.random.key(0), model.params), method, model, tmp_path / "adapter")
    shapes = {name: leaf.shape for name, leaf in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items()}
    root = "base_model.model.encoder.layer.1.attention.self.query."
    assert {name.removeprefix(root): shape for name, shape in shapes.items() if name.startswith(root)} == {
        "lora_A": (6, 32),
        "lora_B": (32, 6),
        "lora_E": (6, 1),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported"),
        ({"modules_to_save": ["pooler"]}, "modules_to_save="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"r": None}, "lacks r"),
        ({"r": 5}, "this text encoder asks for (5, 32) and (32, 5)"),
    ],
)
def test_adapters_that_ask_for_more_are_refused_by_name(bert, tmp_path, change, message):
    shutil.copytree(REFERENCES / "peft_bert", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match="adapter") as refused:
        load_adapter(tmp_path / "adapter", bert[0])
    assert message in str(refused.value)


def test_adapters_with_broken_or_foreign_tensors_are_refused(bert, tmp_path):
    shutil.copytree(REFERENCES / "peft_bert", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    good = load_file(file)
    name = min(good)
    for tensors, message in [
        ({**good, "base_model.model.pooler.dense.lora_A.weight": good[name]}, "belongs to no linear layer"),
        ({k: v for k, v in good.items() if k != name}, "lora_A is missing"),
        ({**good, name: good[name] * np.nan}, "holds NaN"),
    ]:
        save_file(tensors, file)
        with pytest.raises(UserError, match=message):
            load_adapter(tmp_path / "adapter", bert[0])
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="no whole safetensors file"):
        load_adapter(tmp_path / "adapter", bert[0])
    file.unlink()
    with pytest.raises(UserError, match="is missing"):
        load_adapter(tmp_path / "adapter", bert[0])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoRA(0), "text.adapt.rank=0 must be at least 1"),
        (LoRA(targets=()), "text.adapt.targets is empty"),
        (LastLayers(0), "text.adapt.count=0"),
        (Bottleneck(0), "text.adapt.size=0"),
        (Prefix(0), "text.adapt.count=0"),
        (AdaLoRA(4, target_rank=5), "text.adapt.target_rank=5 must lie between 1 and rank=4"),
        (AdaLoRA(beta1=1.0), "beta1=1.0"),
        (AdaLoRA(every=0), "every at least 1"),
    ],
)
def test_settings_without_sense_are_refused(method, message):
    with pytest.raises(UserError, match=message):
        finalize(TextConfig(adapt=method))


def test_what_the_encoder_lacks_is_told(bert):
    model, *_ = bert
    for method, message in [
        (LastLayers(3), "text.adapt.count=3: this text encoder has 2 layers"),
        (LoRA(targets=("q", "query")), "no layer 'query'; it has down, k, out, q, up, v"),
    ]:
        for call in (
            lambda m=method: m.init(jax.random.key(0), model.params, model.architecture),
            lambda m=method: m.axes(model.architecture),
        ):
            with pytest.raises(UserError, match=message):
                call()
    with pytest.raises(UserError, match="in_step=False"):
        finalize(TextConfig(adapt=LoRA(), in_step=False))
    with pytest.raises(UserError, match="adapt_learning_rate_scale=0"):
        finalize(TextConfig(adapt_learning_rate_scale=0.0))
    with pytest.raises(UserError, match=r"warmup_steps=100 and final_steps=100 leave none of train\.steps=200"):
        AdaLoRA().optimizer(optax.sgd(0.1), 200)


def test_additions_are_not_lost_in_a_hugging_face_directory(bert, tmp_path):
    model, *_ = bert
    method = Bottleneck(2)
    params = method.merge(model.params, method.init(jax.random.key(0), model.params, model.architecture))
    with pytest.raises(UserError, match="has no place in a Hugging Face directory"):
        save_pretrained(model, params, tmp_path / "out")
    assert set(flat(logical_axes(adapt.fitted(model.architecture, params).build))) == set(flat(params))


@dataclass(frozen=True)
class Fused(BertConfig):
    """A BERT whose queries, keys and values are stored as one array, as GPT-2's."""

    def tensors(self):
        table = dict(super().tensors())
        for i in range(self.depth):
            for k, layer in enumerate("qkv"):
                table[f"layers.{i}.{layer}.kernel"] = Tensor(f"h.{i}.c_attn.weight", part=(k, 3))
        return table


@pytest.fixture
def fused(bert):
    model, *_ = bert
    return dataclasses.replace(model, architecture=Fused(**dataclasses.asdict(model.architecture)))


def whole_change(trained, method, layer):
    """What a fused array is changed by, [in, 3 out]."""
    f = adapt.factors_of(trained)
    zero = np.zeros((32, 32))
    parts = [f.get(f"layers.{layer}.{name}.kernel") for name in "qkv"]
    return np.concatenate([zero if p is None else method.scale * np.asarray(p["a"] @ p["b"]) for p in parts], axis=1)


def test_a_fused_projection_of_peft_is_split_and_written_back(fused, tmp_path):
    rng = np.random.default_rng(0)
    tensors = {}
    for i in range(2):
        for factor, shape in {"A": (4, 32), "B": (96, 4)}.items():
            name = f"base_model.model.bert.h.{i}.c_attn.lora_{factor}.weight"
            tensors[name] = rng.normal(size=shape).astype(np.float32)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "rank_pattern": {"c_attn": 4}, "alpha_pattern": {"h.1.c_attn": 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    method, trained = load_adapter(tmp_path, fused)
    assert method == LoRA(8, 8.0, ("k", "q", "v"))
    for i, alpha in enumerate((8, 2)):
        a, b = (tensors[f"base_model.model.bert.h.{i}.c_attn.lora_{factor}.weight"] for factor in "AB")
        np.testing.assert_allclose(whole_change(trained, method, i), (b @ a).T * alpha / 4, rtol=1e-5, atol=1e-5)
    save_adapter(trained, method, fused, tmp_path / "again")
    _, again = load_adapter(tmp_path / "again", fused)
    assert {name: leaf.shape for name, leaf in load_file(tmp_path / "again" / "adapter_model.safetensors").items()} == {
        name.replace("bert.", ""): leaf.shape for name, leaf in tensors.items()
    }
    np.testing.assert_allclose(whole_change(again, method, 1), whole_change(trained, method, 1), rtol=1e-6)


@pytest.mark.parametrize("method", [LoRA(2, 3.0, ("q", "v", "up")), LoRA(2, 3.0, ("q", "k", "v"), rslora=True)], ids=str)
def test_parts_trained_apart_are_one_adapter_of_a_higher_rank(fused, tmp_path, method):
    trained = moved(method.init(jax.random.key(0), fused.params))
    save_adapter(trained, method, fused, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for i in range(2):
        module = f"h.{i}.c_attn"
        a, b = (tensors[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "AB")
        rank, alpha = config["rank_pattern"][module], config["alpha_pattern"][module]
        assert a.shape == (rank, 32)
        scale = alpha / (np.sqrt(rank) if method.rslora else rank)
        np.testing.assert_allclose((b @ a).T * scale, whole_change(trained, method, i), rtol=1e-5, atol=1e-6)
    again, loaded = load_adapter(tmp_path / "adapter", fused)
    np.testing.assert_allclose(whole_change(loaded, again, 1), whole_change(trained, method, 1), rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="PEFT's AdaLoRA knows one rank for all"):
        save_adapter(AdaLoRA(2, target_rank=1).init(jax.random.key(0), fused.params), AdaLoRA(2), fused, tmp_path / "other")
