"""Wrong models do not pass for right ones: each mistake that a layer, a mask or a conversion could have, made on purpose and in
one layer where it can be, moves what test_parity compares by more than a hundredth, a thousand times what it allows."""

import functools
import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.nn.module import bind, flatten, unflatten
from jaxgen.text import causal, clip, decoder, gpt2, layer, t5
from jaxgen.text.bert import Bert
from jaxgen.text.clip import CLIPText
from jaxgen.text.encoder import load_pretrained
from tests.text import test_parity
from tests.text.cases import NAMES, Case
from tests.text.test_parity import error, errors, outputs

MOVED = 1e-2
KINDS = ("bert", "gpt2", "clip_l", "t5", "llama2")
# Compiled in a hurry: what a mistake changes is no matter of rounding.
jit = functools.partial(jax.jit, static_argnums=(0, 1), compiler_options={"xla_backend_optimization_level": "0"})
compiled = jit(outputs)


@functools.cache
def loaded(name):
    case = Case(name)
    with tempfile.TemporaryDirectory() as directory:
        case.write(Path(directory))
        return case, load_pretrained(directory, head=case.head)


def moved(name, *, params=lambda flat: {}, architecture=lambda a: {}, retraced=False):
    """The largest error with other parameters {flat name: array}, other fields of the architecture, or other code."""
    case, model = loaded(name)
    flat = dict(flatten(model.params))
    changed = params(flat)
    assert changed.keys() <= flat.keys()
    changed = unflatten(flat | {name: jnp.asarray(value).reshape(flat[name].shape) for name, value in changed.items()})
    run = jit(lambda *a: outputs(*a)) if retraced else compiled
    made = replace(model.architecture, **architecture(model.architecture))
    return max(errors(case, run(made, case.head, changed, case.stored["ids"], case.stored["mask"])).values())


# Parameters: what a table of names or a layout could have wrong.


def swapped(a, b):
    """What lies under two names in the last layer is exchanged."""

    def edit(flat):
        there = {name for name in flat if f"layers.1.{a}." in name}
        pairs = {name: name.replace(f".{a}.", f".{b}.") for name in there}
        return {mine: flat[its] for mine, its in pairs.items()} | {its: flat[mine] for mine, its in pairs.items()}

    return edit


def layers_swapped(flat):
    other = {"0": "1", "1": "0"}
    parts = {name: name.split(".") for name in flat if name.startswith("layers.")}
    return {name: flat[".".join([first, other[i], *rest])] for name, (first, i, *rest) in parts.items()}


def dropped(part, value=1.0):
    return lambda flat: {f"{part}.scale": np.full(flat[f"{part}.scale"].shape, value)}


def transposed(part):
    return lambda flat: {f"{part}.kernel": flat[f"{part}.kernel"].T}


def rolled(part, by=1):
    return lambda flat: {part: np.roll(flat[part], by, axis=0)}


def unscaled(flat):
    """Gemma's words, not multiplied by sqrt(width)."""
    return {"words.embedding": flat["words.embedding"] / flat["norm.scale"].size ** 0.5}


def shifted_back(part):
    """Gemma's norms, multiplying by scale and not by 1 + scale."""
    return lambda flat: {f"{part}.scale": flat[f"{part}.scale"] - 1.0}


ALTERED = [
    *((name, swapped("q", "k")) for name in (*KINDS, "distilbert", "roberta")),
    *((name, swapped("k", "v")) for name in ("bert", "gpt2", "clip_l", "t5", "llama3")),
    *(("qwen3", swapped(a, b)) for a, b in (("q_norm", "k_norm"), ("norm1", "norm2"), ("gate", "up"))),
    *((name, swapped("norm1", "norm2")) for name in ("bert", "gpt2", "clip_l", "t5", "gemma")),
    *(("gemma2", swapped(a, b)) for a, b in (("norm1", "after1"), ("norm2", "after2"), ("after1", "after2"))),
    *((name, layers_swapped) for name in KINDS),
    *((name, transposed(f"layers.1.{part}")) for name in KINDS for part in ("q", "out")),
    *((name, transposed("dense")) for name in ("bert_classifier", "roberta_classifier", "distilbert_classifier")),
    *(
        (name, dropped(f"layers.1.{part}"))
        for name in ("bert", "gpt2", "clip_l", "t5", "llama2")
        for part in ("norm1", "norm2")
    ),
    *((name, dropped("norm")) for name in ("bert", "gpt2", "clip_l", "t5", "llama2")),
    *(("qwen3", dropped(f"layers.1.{part}")) for part in ("q_norm", "k_norm")),
    *(("gemma", dropped(part, 0.0)) for part in ("norm", "layers.1.norm1", "layers.1.norm2")),
    *(("gemma2", dropped(f"layers.1.{part}", 0.0)) for part in ("after1", "after2")),
    *((name, rolled("positions.embedding")) for name in ("bert", "roberta", "gpt2", "clip_l")),
    *((name, rolled("biases.0.embedding")) for name in ("t5", "umt5")),
    *(("bert", rolled(part)) for part in ("words.embedding", "types.embedding")),
    ("umt5", lambda flat: {"biases.1.embedding": flat["biases.0.embedding"]}),  # T5's
    *((name, unscaled) for name in ("gemma", "gemma2", "gemma3_text")),
    *(("gemma", shifted_back(part)) for part in ("norm", "layers.1.norm1", "layers.1.norm2")),
]


@pytest.mark.parametrize(("name", "params"), ALTERED)
def test_altered_parameters_are_told(name, params):
    assert moved(name) <= 1e-5
    assert moved(name, params=params) > MOVED


# Fields: what the reading of a config.json could have wrong.

FIELDS = [
    *((name, lambda a: {"windows": tuple(w and w + 1 for w in a.windows)}) for name in ("mistral", "gemma2", "gemma3_text")),
    *((name, lambda a: {"windows": tuple(w and w - 1 for w in a.windows)}) for name in ("mistral", "gemma2", "gemma3_text")),
    *((name, lambda a: {"windows": (0,) * len(a.windows)}) for name in ("mistral", "qwen2_sliding")),
    ("qwen2_sliding", lambda a: {"windows": a.windows[::-1]}),
    ("gemma3_text", lambda a: {"rotaries": a.rotaries[::-1]}),
    ("smollm3", lambda a: {"rotaries": a.rotaries[::-1]}),
    ("gemma3_text", lambda a: {"scale": a.head_dim**-0.5}),
    ("gemma2", lambda a: {"attention_cap": 0.0}),
    ("gemma2", lambda a: {"final_cap": 0.0}),
    ("gpt2", lambda a: {"scale_attn_by_inverse_layer_idx": False}),
    ("gpt2_untied", lambda a: {"scale_attn_weights": True}),
    ("clip_l", lambda a: {"eos_token_id": 5}),
]


@pytest.mark.parametrize(("name", "architecture"), FIELDS)
def test_other_fields_are_told(name, architecture):
    assert moved(name, architecture=architecture) > MOVED


# Code.


def attends(**more):
    return lambda plain: lambda q, k, v, mask=None, **given: plain(q, k, v, mask, **given | more)


def everything_seen(plain):
    return lambda mask, slots, window=0: plain(mask, jnp.full_like(slots, mask.shape[1]))


def one_more_seen(plain):
    return lambda mask, slots, window=0: plain(mask, slots + 1, window)


def itself_unseen(plain):
    """But the first token, which has no other."""
    return lambda mask, slots, window=0: plain(mask, jnp.maximum(slots - 1, 0), window)


def queries_one_later(plain):
    """A shift of queries and keys together would change nothing: only their distances count."""

    def rotate(x, cos, sin):
        if x.shape[1] == 4:  # the queries' heads
            turn = lambda table: jnp.concatenate([table[..., 1:, :], table[..., -1:, :]], axis=-2)  # noqa: E731
            cos, sin = turn(cos), turn(sin)
        return plain(x, cos, sin)

    return rotate


def neighbours_turned(plain):
    def rotate(x, cos, sin):
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        turned = plain(jnp.concatenate([pairs[..., 0], pairs[..., 1]], axis=-1), cos, sin)
        return jnp.stack(jnp.split(turned, 2, axis=-1), axis=-1).reshape(x.shape)

    return rotate


def padding_seen(plain):
    return lambda q, k, v, mask=None, **given: plain(q, k, v, None, **given)


def without_norm(plain):
    def bound(build, params):
        module = plain(build, params)
        module.norm = lambda x: x
        return module

    return bound


def one_token_off(plain):
    return lambda self, last, ids, mask: plain(self, jnp.roll(last, 1, axis=1), ids, mask)


CAUSAL = [("gpt2", gpt2), ("clip_l", clip), ("llama2", decoder)]
CODE = [
    *((name, layer, "attend", attends(scale=1.0)) for name in ("bert", "clip_l")),
    ("llama2", decoder, "attend", attends(scale=1.0)),
    ("t5", t5, "attend", attends(scale=None)),
    ("t5", t5, "attend", attends(bias=None)),
    *((name, module, "attend", padding_seen) for name, module in (("bert", layer), ("roberta", layer), ("t5", t5))),
    *((*causal, "visible", seen) for causal in CAUSAL for seen in (everything_seen, one_more_seen, itself_unseen)),
    *((name, test_parity, "bind", without_norm) for name in ("gpt2", "clip_l", "t5", "llama2", "gemma")),
    *((name, CLIPText, "pool", one_token_off) for name in ("clip_h", "clip_bigg")),
    ("bert_classifier", Bert, "classify", one_token_off),
    *((name, decoder, "rotate", queries_one_later) for name in ("llama3", "qwen3", "gemma3_text")),
    *((name, decoder, "rotate", neighbours_turned) for name in ("llama3", "qwen3")),
    ("t5", t5, "buckets", lambda plain: lambda distances, *more: plain(-distances, *more)),
    ("t5", t5, "buckets", lambda plain: lambda distances, *more: plain(distances + 1, *more)),
]


@pytest.mark.parametrize(("name", "module", "function", "mistake"), CODE)
def test_other_code_is_told(name, module, function, mistake, monkeypatch):
    monkeypatch.setattr(module, function, mistake(getattr(module, function)))
    assert moved(name, retraced=True) > MOVED


@pytest.mark.parametrize("name", NAMES)
def test_every_hidden_state_is_unlike_its_neighbours(name):
    """So that one in another's place is told."""
    case = Case(name)
    stored = case.stored
    real = stored["mask"] > 0
    for state, following in itertools.pairwise([state[real] for state in stored["states"]]):
        assert error(following, state) > MOVED
        assert error(state, following) > MOVED


# Padding at the end of a causal model's rows is seen by no real token anyway; in front, as it is in generation, it is.


def in_front(name):
    """The largest error of the last state where rows are padded in front and go through a cache."""
    case, model = loaded(name)
    mask = case.stored["mask"]
    turned = [np.roll(row, len(row) - real.sum()) for row, real in zip(case.stored["ids"], mask, strict=True)]

    def run(params, ids, mask):
        module = bind(model.architecture.build, params)
        return module(ids, mask, jnp.float32, module.empty_cache(*ids.shape), 0)[1]

    front = mask[:, ::-1]
    last = np.asarray(jax.jit(run)(model.params, np.stack(turned), front))
    return error(last[front > 0], case.stored["last"][mask > 0])


@pytest.mark.parametrize(("name", "module"), [("gpt2_lm", gpt2), ("llama2", decoder), ("mistral", decoder)])
def test_padding_in_front_is_told_if_it_is_seen(name, module, monkeypatch):
    assert in_front(name) <= 1e-5
    plain = causal.visible
    monkeypatch.setattr(module, "visible", lambda mask, *given: plain(jnp.ones_like(mask), *given))
    assert in_front(name) > MOVED


def test_padding_in_front_is_told_if_it_counts_as_a_position(monkeypatch):
    """With learned ones: rotary ones know only distances."""
    plain = causal.places

    def counted(ids, mask, cache, start):
        slots, _, lengths = plain(ids, mask, cache, start)
        return slots, slots[None], lengths

    monkeypatch.setattr(gpt2, "places", counted)
    assert in_front("gpt2_lm") > MOVED
