"""Every architecture against transformers and PyTorch, float32, on tiny random models (cases.py). That a wrong one would be
told is test_mutations' business."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.nn.module import bind
from jaxgen.text.encoder import load_pretrained
from tests.text.cases import NAMES, Case


def error(ours: Any, theirs: Any) -> float:
    """The largest difference relative to the largest value."""
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def outputs(architecture: Any, head: str, params: Any, ids: Any, mask: Any) -> dict[str, Any]:
    """What transformers computes too, under the names that the references have."""
    module = bind(architecture.build, params)
    states, last = module(ids, mask, jnp.float32)
    out = {"states": states, "last": last, "pooled": module.pool(last, ids, mask)}
    if head:
        out["logits"] = module.logits(last) if head == "lm" else module.classify(last, ids, mask)
    return out


def errors(case: Case, out: dict[str, Any]) -> dict[str, float]:
    """How far each of the outputs is from the reference, over the real tokens."""
    stored, states = case.stored, out["states"]
    assert len(states) == len(stored["states"])
    pairs = {f"states {i}": pair for i, pair in enumerate(zip(states, stored["states"], strict=True))}
    pairs["last"] = (out["last"], stored["last"])
    if "text_embeds" in stored or case.spec.get("pooler"):
        pairs["pooled"] = (out["pooled"], stored.get("text_embeds", stored.get("pooler_output")))
    if case.head:
        pairs["logits"] = (out["logits"], stored["logits"])
    real = stored["mask"] > 0
    pairs = {name: [np.asarray(a)[real] if a.ndim == 3 else a for a in pair] for name, pair in pairs.items()}
    return {name: error(*pair) for name, pair in pairs.items()}


@pytest.mark.parametrize("name", NAMES)
def test_all_states_and_outputs_are_those_of_transformers(name, tmp_path):
    case = Case(name)
    case.write(tmp_path)
    model = load_pretrained(str(tmp_path), head=case.head)
    run = jax.jit(partial(outputs, model.architecture, case.head))
    found = errors(case, run(model.params, case.stored["ids"], case.stored["mask"]))
    assert len(found) >= model.architecture.depth + 2
    assert max(found.values()) <= 1e-5, found
