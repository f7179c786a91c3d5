"""Decoders beside their parity with transformers: caches, padding, what configurations leave out, what files hold besides."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxgen.errors import UserError
from jaxgen.nn.module import bind
from jaxgen.text import registry
from jaxgen.text.encoder import load_pretrained
from tests.text.cases import Case

SIZES = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}
SLIDING = ("sliding_attention", "full_attention")


def load(name, directory):
    case = Case(name)
    case.write(directory)
    stored = case.stored
    model = load_pretrained(str(directory), head=case.head)
    return model, bind(model.architecture.build, model.params), stored


def configured(kind, head="", **fields):
    return registry.architecture({"model_type": kind} | SIZES | fields, "here.json", head)


@pytest.mark.parametrize("name", ["gpt2_lm", "llama_yarn", "gemma3_text", "smollm3_sliding", "gemma2"])
def test_a_cache_filled_piece_by_piece_gives_the_same_states(name, tmp_path):
    _, module, stored = load(name, tmp_path)
    ids, mask = jnp.asarray(stored["ids"]), jnp.asarray(stored["mask"])
    states, last = jax.jit(lambda: module(ids, mask))()
    # Padded in front, in a cache with room behind that no one may see.
    real = np.asarray(mask) > 0
    rows = [np.concatenate([np.zeros(11 - r.sum(), int), i[r]]) for i, r in zip(stored["ids"], real, strict=True)]
    front, seen = jnp.asarray(np.stack(rows)), jnp.asarray(np.pad(real[:, ::-1], ((0, 0), (0, 3)), constant_values=True))
    cache = jax.tree.map(lambda a: a + 7.0, module.empty_cache(3, 14))
    run, pieces = jax.jit(lambda ids, cache, start: module(ids, seen, jnp.float32, cache, start)), []
    for start, stop in ((0, 5), (5, 6), (6, 11)):
        _, piece, cache = run(front[:, start:stop], cache, start)
        pieces.append(piece)
    together = np.concatenate(pieces, axis=1)
    for row in range(3):
        count = real[row].sum()
        np.testing.assert_allclose(together[row, 11 - count :], last[row, :count], atol=3e-5 * float(jnp.abs(last).max()))
    assert len(states) == len(cache) + 1
    assert cache[0][0].shape == cache[0][1].shape == (3, cache[0][0].shape[1], 14, cache[0][0].shape[3])


@pytest.mark.parametrize("name", ["gpt2", "llama_longrope_long", "gemma2_uncapped"])
def test_padding_and_what_follows_change_nothing(name, tmp_path):
    _, module, stored = load(name, tmp_path)
    ids, mask = stored["ids"], stored["mask"]
    run = jax.jit(lambda ids, mask: module(ids, mask)[1])
    last = run(ids, mask)
    wider = np.pad(ids, ((0, 0), (0, 5)), constant_values=9), np.pad(mask, ((0, 0), (0, 5)))
    np.testing.assert_allclose(run(*wider)[:, :11][mask > 0], last[mask > 0], rtol=1e-4, atol=1e-4)
    if name != "llama_longrope_long":  # whose frequencies hang on how long the row is
        np.testing.assert_allclose(run(ids[:, :4], mask[:, :4]), last[:, :4], rtol=1e-4, atol=1e-4)
    pooled = module.pool(last, ids, jnp.asarray(mask))
    np.testing.assert_array_equal(pooled, np.stack([np.asarray(last)[i, n - 1] for i, n in enumerate(mask.sum(1))]))


@pytest.mark.parametrize("name", ["gpt2_lm", "gpt2_untied", "llama2", "llama3", "qwen3_vl"])
def test_without_a_head_its_weights_are_left_out_and_buffers_always(name, tmp_path):
    case = Case(name)
    case.write(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tied = "lm_head.weight" not in tensors
    if "gpt2" in name:
        more = {"bias": np.ones((1, 1, 4, 4), np.float32), "masked_bias": np.full((), -1e9, np.float32)}
        more = {f"transformer.h.0.attn.{buffer}": value for buffer, value in more.items()}
    else:
        more = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    if tied:  # some files hold the tied head too
        more["lm_head.weight"] = np.full((97, 32), 3.0, np.float32)
    save_file(tensors | more, file)
    stored = case.stored
    for head in ("", "lm"):
        model = load_pretrained(str(tmp_path), head=head)
        assert ("lm_head" in model.params) == (head == "lm" and not tied)
    module = bind(model.architecture.build, model.params)
    logits = jax.jit(lambda ids, mask: module.logits(module(ids, mask)[1]))(stored["ids"], stored["mask"])
    real = stored["mask"] > 0
    np.testing.assert_allclose(logits[real], stored["logits"][real], atol=1e-4 * np.abs(stored["logits"]).max())


@pytest.mark.parametrize(
    ("name", "prefixes"),
    [
        ("gemma3", {"language_model.model.": "model.language_model.", "": "model."}),
        ("qwen2_5_vl", {"lm_head.": "lm_head.", "model.": "model.language_model.", "": "model."}),
    ],
)
def test_models_with_eyes_load_by_either_of_their_names(name, prefixes, tmp_path):
    """Files have one layout, transformers' modules since 4.52 another, and some trainers write the modules' names."""
    case = Case(name)
    case.write(tmp_path)
    usual = load_pretrained(str(tmp_path), head="lm")
    file, renamed = tmp_path / "model.safetensors", {}
    for tensor, value in load_file(file).items():
        prefix = next(p for p in prefixes if tensor.startswith(p))
        renamed[prefixes[prefix] + tensor.removeprefix(prefix)] = value
    save_file(renamed, file)
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(str(tmp_path), head="lm").params, usual.params)


def test_what_published_files_leave_out():
    """The text part of google/gemma-3-4b-it says no more than this."""
    rope = {"factor": 8.0, "rope_type": "linear"}
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    gemma = registry.architecture(
        {"model_type": "gemma3", "text_config": text | {"rope_scaling": rope, "sliding_window": 1024}}, "here.json", "lm"
    )
    assert (gemma.num_attention_heads, gemma.num_key_value_heads, gemma.head_dim, gemma.vocab_size) == (8, 4, 256, 262_208)
    assert gemma.windows == tuple(0 if (i + 1) % 6 == 0 else 1024 for i in range(34))
    assert (gemma.tied, gemma.scale, gemma.activation, gemma.max_length) == (True, 1 / 16, "gelu_pytorch_tanh", 131_072)
    near, far = gemma.rotaries[0].frequencies, gemma.rotaries[5].frequencies
    assert (near[0], far[0]) == (1.0, 1 / 8)
    np.testing.assert_allclose((near[64], far[64]), (1e-2, 1e-3 / 8))

    assert configured("llama", num_key_value_heads=None).num_key_value_heads == 2
    assert configured("mistral").windows == (4096, 4096)
    assert configured("mistral", sliding_window=None).windows == (0, 0)
    assert configured("qwen2").windows == configured("qwen3", sliding_window=4).windows == (0, 0)
    assert configured("qwen2", use_sliding_window=True, max_window_layers=1, sliding_window=4).windows == (0, 4)
    assert configured("qwen3").head_dim == configured("qwen3_vl_text").head_dim == 128
    assert configured("qwen3", head_dim=None).head_dim == 4
    assert configured("gemma", hidden_act="gelu").activation == "gelu_pytorch_tanh"
    assert configured("gemma2", hidden_activation="gelu").activation == "gelu"
    assert configured("gemma2").windows == (4096, 0)
    assert (configured("gemma2").attention_cap, configured("gemma2").final_cap) == (50.0, 30.0)
    assert configured("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None).final_cap == 0.0
    thetas = {"llama": 1e4, "smollm3": 2e6, "qwen2_5_vl": 1e6, "qwen2_5_vl_text": 1e6, "qwen3_vl_text": 5e5, "gemma": 1e4}
    for kind, theta in thetas.items():
        made = configured(kind, head_dim=4)
        np.testing.assert_allclose(made.rotaries[0].frequencies[1], theta**-0.5)
    assert [bool(r) for r in configured("smollm3", num_hidden_layers=5).rotaries] == [True, True, True, False, True]
    dynamic = configured("llama", rope_scaling={"type": "dynamic", "factor": 2.5})
    assert (dynamic.max_length, configured("llama").max_length) == (40, 16)


def test_biases_are_where_each_kind_has_them():
    for kind, q, out, up in (
        ("llama", 1, 1, 1),
        ("mistral", 0, 0, 0),
        ("qwen2", 1, 0, 0),
        ("qwen2_5_vl_text", 1, 0, 0),
        ("qwen3", 1, 1, 0),
        ("smollm3", 1, 1, 1),
        ("gemma", 1, 1, 0),
        ("gemma3_text", 1, 1, 0),
    ):
        made = configured(kind, attention_bias=True, mlp_bias=True)
        assert [made.qkv_bias, made.out_bias, made.mlp_bias] == [q, out, up], kind
    assert configured("qwen2").qkv_bias
    assert not configured("llama").qkv_bias


@pytest.mark.parametrize(
    ("fields", "head", "message"),
    [
        ({}, "classification", "of a llama the language model is read; it has no classification head"),
        ({"hidden_act": "swish"}, "", "hidden_act='swish' is not supported"),
        ({"num_key_value_heads": 3}, "", "2 attention heads do not divide among 3 of keys and values"),
        ({"head_dim": 5}, "", "a head_dim that is even and at most 65536, not 5"),
        ({"num_hidden_layers": 10**8}, "", "100000000 layers are no model's"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "", "use_bidirectional_attention=True"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "", "layer_types must be full_attention or"),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 2}, "", "layer_types must be full_attention or"),
        ({"model_type": "gemma2", "sliding_window": None}, "", "sliding attention need a sliding_window, not 0"),
        ({"model_type": "qwen2", "layer_types": list(SLIDING), "sliding_window": 1.5}, "", "need a sliding_window, not 1.5"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "", "no_rope_layers must have a 0 or 1 for each of 2 layers"),
        ({"vocab_size": None}, "", "lacks vocab_size"),
        ({"rms_norm_eps": -1.0}, "", "rms_norm_eps=-1.0 makes no sense"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "", "makes no sense for a gemma2"),
    ],
)
def test_what_is_not_done_is_told(fields, head, message):
    with pytest.raises(UserError) as error:
        configured(**{"kind": "llama", "head": head} | {("kind" if k == "model_type" else k): v for k, v in fields.items()})
    assert str(error.value).startswith("here.json")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"add_cross_attention": True}, "add_cross_attention=True is not supported"),
        ({"activation_function": "swish"}, "activation_function='swish' is not supported"),
        ({"n_head": 3}, "8 does not divide among 3"),
        ({"n_embd": None}, "lacks n_embd"),
    ],
)
def test_gpt2_tells_too(fields, message):
    values = {"model_type": "gpt2", "vocab_size": 8, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    assert registry.architecture(values, "here.json").n_inner == 32
    assert registry.architecture(values | {"n_inner": None}, "here.json").max_length == 16
    with pytest.raises(UserError, match=message):
        registry.architecture(values | fields, "here.json")
    with pytest.raises(UserError, match="has no classification head"):
        registry.architecture(values, "here.json", "classification")


def test_bfloat16_stays_near(tmp_path):
    case = Case("gemma3_text")
    case.write(tmp_path)
    stored = case.stored
    model = load_pretrained(str(tmp_path), head="lm", dtype=jnp.bfloat16)
    module = bind(model.architecture.build, model.params)
    states, last = jax.jit(lambda ids, mask: module(ids, mask, jnp.bfloat16))(stored["ids"], stored["mask"])
    assert {state.dtype for state in (*states, last)} == {jnp.bfloat16.dtype}
    real = stored["mask"] > 0
    assert np.abs(np.asarray(last, np.float32) - stored["last"])[real].mean() / np.abs(stored["last"][real]).mean() < 0.05
    assert json.loads(str(stored["config"]))["model_type"] == "gemma3_text"
