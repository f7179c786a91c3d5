"""Every architecture against transformers and PyTorch, float32, on tiny random models (cases.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.nn.module import bind
from jaxgen.text.encoder import load_pretrained
from tests.text.cases import NAMES, Case


def error(ours, theirs):
    """The largest difference relative to the largest value."""
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("name", NAMES)
def test_all_states_and_outputs_are_those_of_transformers(name, tmp_path):
    case = Case(name)
    case.write(tmp_path)
    stored = case.stored
    model = load_pretrained(str(tmp_path), head=case.head)
    ids, mask = jnp.asarray(stored["ids"]), jnp.asarray(stored["mask"])

    @jax.jit
    def run(params):
        module = bind(model.architecture.build, params)
        states, last = module(ids, mask, jnp.float32)
        out = {"pooled": module.pool(last, ids, mask)}
        if case.head:
            out["logits"] = module.logits(last) if case.head == "lm" else module.classify(last, ids, mask)
        return states, last, out

    states, last, out = run(model.params)
    real = np.asarray(mask) > 0
    assert len(states) == len(stored["states"]) == model.architecture.depth + 1
    for ours, theirs in zip([*states, last], [*stored["states"], stored["last"]], strict=True):
        assert error(np.asarray(ours)[real], theirs[real]) <= 1e-5
    pooled = stored.get("text_embeds", stored.get("pooler_output") if case.spec.get("pooler") else None)
    if pooled is not None:
        assert error(out["pooled"], pooled) <= 1e-5
    if case.head == "lm":
        assert error(np.asarray(out["logits"])[real], stored["logits"][real]) <= 1e-5
    elif case.head:
        assert error(out["logits"], stored["logits"]) <= 1e-5


def test_attention_is_far_from_uniform(tmp_path):
    """Else a wrong query would pass: other weights of q alone move the last state by more than a hundredth."""
    case = Case("bert")
    case.write(tmp_path)
    model = load_pretrained(str(tmp_path))
    ids, mask = jnp.asarray(case.stored["ids"]), jnp.asarray(case.stored["mask"])
    layers = model.params["layers"].items()
    changed = {**model.params, "layers": {i: {**layer, "q": jax.tree.map(jnp.zeros_like, layer["q"])} for i, layer in layers}}
    run = lambda params: bind(model.architecture.build, params)(ids, mask, jnp.float32)[1]  # noqa: E731
    assert error(run(changed)[mask > 0], np.asarray(run(model.params)[mask > 0])) > 1e-2
