"""What docs/text-encoders.md shows how to add is a right architecture (that its blocks run is test_readme's business)."""

import json
import subprocess
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxgen.text
from jaxgen.errors import UserError
from jaxgen.nn.module import bind
from jaxgen.text import registry
from jaxgen.text.encoder import load_pretrained
from tests.test_readme import blocks
from tests.text.cases import Case

PAGE = Path(__file__).parents[2] / "docs" / "text-encoders.md"


def test_the_worked_example_equals_transformers(tmp_path, monkeypatch):
    (example,) = (code for language, code in blocks(PAGE.read_text()) if language == "python" and "ElectraConfig" in code)
    assert len(example.splitlines()) <= 60
    case = Case("example/electra")
    case.write(tmp_path)
    with pytest.raises(UserError, match="'electra' is not known here; known: bert, clip"):
        load_pretrained(str(tmp_path))
    module = types.ModuleType("jaxgen.text.my_electra")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(registry, "ARCHITECTURES", dict(registry.ARCHITECTURES))
    exec(example, module.__dict__)
    model, stored = load_pretrained(str(tmp_path)), case.stored
    states, _ = bind(model.architecture.build, model.params)(jnp.asarray(stored["ids"]), jnp.asarray(stored["mask"]))
    real = stored["mask"] > 0
    for ours, theirs in zip(states, stored["states"], strict=True):
        assert np.abs(np.asarray(ours)[real] - theirs[real]).max() <= 1e-5 * np.abs(theirs[real]).max()


def test_what_drawing_does_not_need_is_imported_when_it_is_asked_for():
    code = (
        "import json, sys, jaxgen.text as text; before = {*sys.modules};"
        "names = [getattr(text, n).__name__ for n in text.__all__];"
        "print(json.dumps([names, sorted(n for n in {*sys.modules} - before if n.startswith('jaxgen')), sorted(before)]))"
    )
    names, later, before = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    assert names == jaxgen.text.__all__
    assert later == ["jaxgen.text.classifier", "jaxgen.text.expand", "jaxgen.text.generate"]
    assert not {"transformers", "torch", "tokenizers", "huggingface_hub", "jaxgen.text.t5", "jaxgen.text.decoder"} & {*before}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        jaxgen.text.nothing  # noqa: B018


def test_every_architecture_is_in_the_table():
    table = PAGE.read_text().partition("## What loads")[2].partition("##")[0]
    for kind in {*registry.ARCHITECTURES, *registry.PARTS} - {part for part in registry.PARTS.values() if "vl" in part}:
        assert kind in table, kind
