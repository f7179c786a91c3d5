import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxgen.errors import UserError
from jaxgen.text import check_prompts, load_text_encoder
from jaxgen.text.sources import resolve

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
TINY = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}


@pytest.fixture
def directory(tmp_path):
    """A whole Hugging Face directory with a tiny random BERT."""
    from jaxgen.text.bert import BertConfig, tensors

    rng = np.random.default_rng(0)
    names = tensors(BertConfig.from_hf(TINY, ""))
    shapes = {
        "embeddings.word_embeddings.weight": (30522, 8),
        "embeddings.position_embeddings.weight": (32, 8),
        "embeddings.token_type_embeddings.weight": (2, 8),
        "encoder.layer.0.intermediate.dense.weight": (16, 8),
        "encoder.layer.0.intermediate.dense.bias": (16,),
        "encoder.layer.0.output.dense.weight": (8, 16),
    }
    square = {name: (8, 8) if name.endswith("weight") and "LayerNorm" not in name else (8,) for name in names}
    flat = {n: rng.normal(size=s, scale=0.1).astype(np.float32) for n, s in (square | shapes).items()}
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    shutil.copy(resolve(MINILM) / "tokenizer.json", tmp_path)
    save_file(flat, tmp_path / "model.safetensors")
    return tmp_path


def change(directory, edit):
    flat = load_file(directory / "model.safetensors")
    edit(flat)
    save_file(flat, directory / "model.safetensors")


def test_prefixes_and_ignored_tensors_change_nothing(directory):
    before = load_text_encoder(str(directory))("a red circle")
    flat = {f"bert.{name}": value for name, value in load_file(directory / "model.safetensors").items()}
    save_file(flat | {"cls.predictions.bias": np.zeros(3, np.float32)}, directory / "model.safetensors")
    after = load_text_encoder(str(directory))("a red circle")
    np.testing.assert_array_equal(before.hidden, after.hidden)


QUERY = "encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda flat: flat.pop(QUERY), f"tensor {QUERY} is missing"),
        (lambda flat: flat.update({"surprise": np.zeros(2, np.float32)}), "surprise belongs to no part"),
        (
            lambda flat: flat.update({QUERY: np.zeros((8, 9), np.float32)}),
            r"has shape \[8, 9\] and config.json asks for \[8, 8\]",
        ),
        (lambda flat: flat.update({QUERY: np.full((8, 8), np.nan, np.float32)}), "holds NaN"),
        (lambda flat: flat.update({QUERY: np.zeros((8, 8), np.int32)}), "not a floating-point"),
    ],
)
def test_wrong_tensors_are_named(directory, edit, message):
    change(directory, edit)
    with pytest.raises(UserError, match=message):
        load_text_encoder(str(directory))


def test_wrong_files_are_told(directory):
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    for data in (whole[:-10], whole[:5], b"not weights at all"):
        file.write_bytes(data)
        with pytest.raises(UserError, match="no whole safetensors file"):
            load_text_encoder(str(directory))
    file.rename(directory / "pytorch_model.bin")
    with pytest.raises(UserError, match="a pickle"):
        load_text_encoder(str(directory))
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        load_text_encoder(str(directory))


def test_wrong_directories_are_told(directory):
    (directory / "config.json").write_text(json.dumps(TINY | {"model_type": "gru"}))
    with pytest.raises(UserError, match="'gru' is not known here; known: bert"):
        load_text_encoder(str(directory))
    (directory / "config.json").write_text("{")
    with pytest.raises(UserError, match="no valid JSON"):
        load_text_encoder(str(directory))
    (directory / "config.json").write_text(json.dumps(TINY))
    (directory / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        load_text_encoder(str(directory))
    with pytest.raises(UserError, match="no such directory"):
        load_text_encoder("./nowhere")


def test_the_fingerprint_follows_weights_tokenizer_and_settings(directory):
    first = load_text_encoder(str(directory)).fingerprint
    assert load_text_encoder(str(directory)).fingerprint == first
    assert load_text_encoder(str(directory), layers=0).fingerprint != first
    from jaxgen.text import sources

    change(directory, lambda flat: flat.update({QUERY: flat[QUERY] + 1}))
    sources.sha256.cache_clear()
    assert load_text_encoder(str(directory)).fingerprint != first


def test_prompts_are_checked():
    encoder = load_text_encoder(MINILM)
    assert check_prompts(encoder, ["a small red circle"]) == []
    (warning,) = check_prompts(encoder, ["red " * 400])
    assert "only the first 256 count" in warning
    with pytest.raises(UserError, match="empty prompt"):
        check_prompts(encoder, ["a circle", "  "])
    with pytest.raises(UserError, match="multilingual"):
        check_prompts(encoder, ["一个小的红色圆形在一个大的蓝色正方形的左边"])
