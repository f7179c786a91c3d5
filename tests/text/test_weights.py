import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxgen.errors import UserError
from jaxgen.nn.module import flatten, init_params
from jaxgen.text import PairedTextEncoder, check_prompts, load_text_encoder, scratch, weights
from jaxgen.text.bert import BertConfig
from jaxgen.text.sources import resolve
from jaxgen.text.weights import Tensor

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
    rng = np.random.default_rng(0)
    config = BertConfig.from_hf(TINY, "")
    abstract = jax.eval_shape(lambda: init_params(config.build, jax.random.key(0)))
    ours = {name: rng.normal(size=leaf.shape, scale=0.1).astype(np.float32) for name, leaf in flatten(abstract)}
    flat = weights.stored(ours, config.tensors())
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
    for name in ("pytorch_model.bin", "model.bin", "weights.pt", "weights.pth", "weights.ckpt", "adapter.bin"):
        file = file.rename(directory / name)
        with pytest.raises(UserError, match=f"has only {name}, a pickle"):
            load_text_encoder(str(directory))
    file.unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        load_text_encoder(str(directory))


TABLE = {"a.kernel": Tensor("a.weight", transposed=True), "a.bias": Tensor("a.bias"), "b": Tensor("b.weight")}
TABLE_SHAPES = {"a.kernel": (2, 3), "a.bias": (3,), "b": (4,)}
STORED = {"a.weight": np.arange(6.0).reshape(3, 2), "a.bias": np.arange(3.0), "b.weight": np.arange(4.0)}


def store(directory, parts):
    """Their tensors in several files with an index; `parts` is {file: {name: value}}."""
    for name, flat in parts.items():
        save_file({key: np.ascontiguousarray(value, np.float32) for key, value in flat.items()}, directory / name)
    where = {key: name for name, flat in parts.items() for key in flat}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("prefix", ["", "bert.", "model."])
def test_tensors_come_from_several_files(tmp_path, prefix):
    named = {prefix + name: value for name, value in STORED.items()}
    first = {name: named.pop(name) for name in [prefix + "a.weight"]}
    store(tmp_path, {"model-1.safetensors": first, "model-2.safetensors": named | {"head.x": np.full(2, np.nan)}})
    loaded = weights.load(tmp_path, TABLE, TABLE_SHAPES, ignored=(r"head\.", r"pooler\."), prefixes=("bert.", "model."))
    np.testing.assert_array_equal(loaded["a"]["kernel"], [[0, 2, 4], [1, 3, 5]])
    np.testing.assert_array_equal(loaded["a"]["bias"], [0, 1, 2])
    np.testing.assert_array_equal(loaded["b"], [0, 1, 2, 3])
    assert loaded["a"]["kernel"].dtype == np.float32
    with pytest.raises(UserError, match="belongs to no part"):  # neither ignored nor known
        weights.load(tmp_path, TABLE, TABLE_SHAPES, prefixes=("bert.", "model."))


def test_an_index_is_checked(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    store(tmp_path, {"model-1.safetensors": STORED})
    for text in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1, "b": "c"}}'):
        index.write_text(text)
        with pytest.raises(UserError, match="is no valid index"):
            weights.load(tmp_path, TABLE, TABLE_SHAPES)
    index.write_text(json.dumps({"weight_map": {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}}))
    with pytest.raises(UserError, match=r"model-2\.safetensors is missing, which model\.safetensors\.index\.json names"):
        weights.load(tmp_path, TABLE, TABLE_SHAPES)
    (tmp_path / "sub").mkdir()
    for elsewhere in ("../outside.safetensors", "sub/inside.safetensors"):
        store(tmp_path, {elsewhere: STORED})
        with pytest.raises(UserError, match=f"{elsewhere} is missing, which"):  # files of the directory alone are the model's
            weights.load(tmp_path, TABLE, TABLE_SHAPES)


def test_all_that_is_missing_is_counted(tmp_path):
    for kept, message in (
        ("a.bias", "tensor a.weight is missing and 1 more;"),
        ("a.weight", "tensor a.bias is missing and 1 more;"),
    ):
        save_file({kept: STORED[kept].astype(np.float32)}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=message):
            weights.load(tmp_path, TABLE, TABLE_SHAPES)
    two = {name: STORED[name].astype(np.float32) for name in ("a.weight", "a.bias")}
    save_file(two, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor b\.weight is missing; download"):
        weights.load(tmp_path, TABLE, TABLE_SHAPES)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_enough(tmp_path, value):
    flat = {name: array.astype(np.float32) for name, array in STORED.items()}
    flat["b.weight"][2] = value
    save_file(flat, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor b\.weight holds NaN or infinity"):
        weights.load(tmp_path, TABLE, TABLE_SHAPES)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [("F16", None), ("BF16", None), ("F8_E4M3", "cannot be read|not a floating-point"), ("I16", "not a floating")],
)
def test_half_precision_is_read_and_the_rest_told(tmp_path, dtype, message):
    """A file by hand: 2.0, 1.0, -2.0, 0.5 in `dtype`."""
    data = {
        "F16": np.array([2, 1, -2, 0.5], np.float16).tobytes(),
        "BF16": (np.array([2, 1, -2, 0.5], np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes(),
        "F8_E4M3": bytes([0x40, 0x38, 0xC0, 0x30]),
        "I16": np.array([2, 1, -2, 0], np.int16).tobytes(),
    }[dtype]
    header = json.dumps({"b.weight": {"dtype": dtype, "shape": [4], "data_offsets": [0, len(data)]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    table, shapes = {"b": Tensor("b.weight")}, {"b": (4,)}
    if message is not None:
        with pytest.raises(UserError, match=f"tensor b.weight .*({message})"):
            weights.load(tmp_path, table, shapes)
        return
    loaded = weights.load(tmp_path, table, shapes)["b"]
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, [2, 1, -2, 0.5])


def test_buffers_begin_where_a_device_takes_them_over():
    for count in range(1, 40):
        buffer = weights._empty([count, 3], np.float16)
        assert (buffer.shape, buffer.dtype, buffer.ctypes.data % 64) == ((count, 3), np.float16, 0)
        buffer[:] = count  # all of it is there


def test_wrong_directories_are_told(directory):
    (directory / "config.json").write_text(json.dumps(TINY | {"model_type": "gru"}))
    with pytest.raises(UserError, match="'gru' is not known here; known: bert, clip"):
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

    change(directory, lambda flat: flat.update({QUERY: flat[QUERY] + 1}))
    assert load_text_encoder(str(directory)).fingerprint != first


def test_prompts_are_checked():
    encoder = load_text_encoder(MINILM)
    assert check_prompts(encoder, ["a small red circle"]) == []
    (warning,) = check_prompts(encoder, ["red " * 400])
    assert "only the first 256 count" in warning
    with pytest.raises(UserError, match="empty prompt"):
        check_prompts(encoder, ["a circle", "  "])
    chinese = "一个小的红色圆形在一个大的蓝色正方形的左边"
    with pytest.raises(UserError, match=f"does not know 57% of '{chinese}': the tokenizer of {MINILM} lacks .* multilingual"):
        check_prompts(encoder, [chinese])


def test_of_a_pair_one_that_understands_is_enough(tmp_path):
    chinese = "一个小的红色圆形"
    scratch.write(tmp_path / "zh", [chinese], hidden_size=8, layers=1, vocab=200, max_length=8)
    knows, other = load_text_encoder(str(tmp_path / "zh")), load_text_encoder(MINILM, max_length=6)
    with pytest.raises(UserError, match=MINILM):
        check_prompts(other, [chinese])
    for pair in (PairedTextEncoder(knows, other), PairedTextEncoder(other, knows)):
        assert check_prompts(pair, [chinese[:6]]) == []
        (warning,) = check_prompts(pair, [chinese])
        assert warning.endswith("has 10 tokens; only the first 8 count")
        with pytest.raises(UserError, match=r"does not know 100% of '猫'"):
            check_prompts(pair, ["猫"])
