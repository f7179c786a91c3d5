"""Pickled weights to safetensors. What reads pickles needs torch, which the tests' environment may not have."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.parallel import runtime
from jaxgen.text import convert, load_text_encoder
from tests.text.test_malformed import STORED, TINY, words

try:
    import torch
except ImportError:
    torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="reads pickles: extra `torch`")


@pytest.fixture
def source(tmp_path):
    """A directory without weights."""
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(TINY))
    (directory / "tokenizer.json").write_text(json.dumps(words()))
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 12}')
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return directory


def run(capsys, monkeypatch, *arguments):
    """Exit status, lines of the output, lines of the errors."""
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    status = convert.main()
    out, err = capsys.readouterr()
    return status, out.splitlines(), err.splitlines()


def test_without_torch_it_says_how_to_install_it(source, tmp_path, capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    monkeypatch.setattr(runtime.shutil, "which", lambda name: None)
    status, out, (line,) = run(capsys, monkeypatch, source, tmp_path / "new")
    assert (status, out) == (1, [])
    assert line.startswith("error: torch is not installed: run `")
    assert line.endswith('-m pip install "jaxgen[torch]"`')
    assert not (tmp_path / "new").exists()


def test_the_module_runs_as_a_command(tmp_path):
    command = [sys.executable, "-m", "jaxgen.text.convert", str(tmp_path / "none"), str(tmp_path / "new")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_what_is_read_is_chosen_without_torch(source):
    with pytest.raises(UserError, match="has no pickled weights"):
        convert.pickles(source)
    (source / "a.ckpt").touch()
    assert convert.pickles(source) == [source / "a.ckpt"]
    (source / "b.pt").touch()
    with pytest.raises(UserError, match=r"has a\.ckpt, b\.pt: give the file to read"):
        convert.pickles(source)
    assert convert.pickles(source / "b.pt") == [source / "b.pt"]
    (source / "pytorch_model.bin").touch()
    assert convert.pickles(source) == [source / "pytorch_model.bin"]
    (source / "a.bin").touch()
    index = source / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"x": "b.pt", "y": "a.bin", "z": "b.pt"}}')
    assert convert.pickles(source) == [source / "b.pt", source / "a.bin"]
    for text in ('{"weight_map": {"x": "c.bin"}}', '{"weight_map": {"x": "../a.bin"}}', '{"weight_map": {"x": 3}}', "{}"):
        index.write_text(text)
        with pytest.raises(UserError, match="which is no file beside it"):
            convert.pickles(source)
    index.write_text("{")
    with pytest.raises(UserError, match="is no valid JSON"):
        convert.pickles(source)
    for wrong in (source / "config.json", source / "nowhere"):
        with pytest.raises(UserError, match="is no directory and no"):
            convert.pickles(wrong)


def state():
    return {name: torch.from_numpy(value.copy()) for name, value in STORED.items()}


@needs_torch
@pytest.mark.parametrize("kind", ["pytorch_model.bin", "sharded", "old.pt", "model.pth", "last.ckpt"])
def test_every_kind_of_file_gives_the_same_model(source, tmp_path, kind, capsys, monkeypatch):
    whole = state()
    if kind == "sharded":
        names = sorted(whole)
        files = {"pytorch_model-1.bin": names[:7], "pytorch_model-2.bin": names[7:]}
        for file, part in files.items():
            torch.save({name: whole[name] for name in part}, source / file)
        where = {name: file for file, part in files.items() for name in part}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    elif kind == "old.pt":
        torch.save(whole, source / kind, _use_new_zipfile_serialization=False)
    elif kind == "last.ckpt":
        torch.save({"epoch": 3, "state_dict": {"state_dict": whole}, "optimizer": {"lr": 0.1}}, source / kind)
    else:
        torch.save(whole | {"step": 7, "name": "bert"}, source / kind)
    status, out, err = run(capsys, monkeypatch, source, tmp_path / "new" / "er")
    assert (status, err) == (0, [])
    wrote = ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "1_Pooling/config.json", "config.json"]
    assert [line.split(" (")[0] for line in out] == [str(tmp_path / "new" / "er" / name) for name in wrote]
    encoder = load_text_encoder(str(tmp_path / "new" / "er"))
    assert encoder.max_length == 12
    np.testing.assert_array_equal(encoder.params["words"]["embedding"], STORED["embeddings.word_embeddings.weight"])
    text = encoder("a red circle")
    np.testing.assert_allclose(text.pooled[0], text.hidden[0][np.asarray(text.mask[0])].mean(0), atol=1e-6)


@needs_torch
def test_shared_and_turned_tensors_are_copies(source, tmp_path):
    from safetensors.numpy import load_file

    word = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "a": word,
        "tied": word,
        "turned": word.T,
        "part": word[1:, ::2],
        "half": word.bfloat16(),
        "ids": torch.arange(3),
    }
    torch.save(tensors | {"parameter": torch.nn.Parameter(word)}, source / "pytorch_model.bin")
    convert.convert(source, tmp_path / "new")
    with pytest.raises(UserError, match="is not empty: choose a new directory"):
        convert.convert(source, tmp_path / "new")
    found = load_file(tmp_path / "new" / "model.safetensors")
    assert found.keys() == {*tensors, "parameter"}
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name].astype(np.float32), value.float().numpy())
    assert found["ids"].dtype == np.int64
    np.testing.assert_array_equal(found["parameter"], word.numpy())


@needs_torch
@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x04K\x01.", b"cos\nsystem\n(S'true'\ntR.", b"words"])
def test_what_torch_refuses_is_told(source, tmp_path, data, capsys, monkeypatch):
    (source / "pytorch_model.bin").write_bytes(data)
    status, out, (line,) = run(capsys, monkeypatch, source, tmp_path / "new")
    assert (status, out) == (1, [])
    assert line.startswith(f"error: {source / 'pytorch_model.bin'}: torch does not load it") or "holds no tensors" in line
    assert not (tmp_path / "new").exists()


@needs_torch
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "holds no tensors by name"),
        ([1, 2], "holds no tensors by name"),
        ({"epoch": 1}, "holds no tensors by name"),
        ({"state_dict": {}}, "holds no tensors by name"),
        ("sparse", "tensor 'a' is sparse or quantised"),
        ({"args": os.path.join}, "torch does not load it with weights_only=True"),
    ],
    ids=range(6),
)
def test_files_without_plain_tensors_are_told(source, tmp_path, values, message):
    torch.save({"a": torch.eye(2).to_sparse()} if values == "sparse" else values, source / "model.pt")
    with pytest.raises(UserError, match=message):
        convert.convert(source, tmp_path / "new")


@needs_torch
def test_a_tensor_in_two_files_is_told(source, tmp_path):
    for name in ("1.bin", "2.bin"):
        torch.save({"a": torch.ones(2)}, source / name)
    (source / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "1.bin", "b": "2.bin"}}')
    with pytest.raises(UserError, match="tensor 'a' is there twice"):
        convert.convert(source, tmp_path / "new")
