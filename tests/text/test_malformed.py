"""Files that are broken in any way, by accident or on purpose: one line that names what is wrong, or the very same model."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from jaxgen.errors import UserError
from jaxgen.nn.module import flatten, init_params
from jaxgen.text import load_text_encoder, save_text_encoder, sources, weights
from jaxgen.text.bert import BertConfig
from tests.text.cases import random_tensor

TINY = {
    "model_type": "bert",
    "vocab_size": 8,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 6,
    "max_position_embeddings": 16,
}
VOCABULARY = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "red": 4, "circle": 5, "a": 6, "blue": 7}
CONFIG = BertConfig.from_hf(TINY, "")
ABSTRACT = jax.eval_shape(lambda: init_params(CONFIG.build, jax.random.key(0)))
SHAPES = {name: leaf.shape for name, leaf in flatten(ABSTRACT)}
STORED = weights.stored({name: random_tensor(name, shape) for name, shape in SHAPES.items()}, CONFIG.tensors())
WHOLE = save(STORED, {"format": "pt"})
START = 8 + int.from_bytes(WHOLE[:8], "little")  # of the numbers
QUERY = "encoder.layer.0.attention.self.query.weight"
UP = "encoder.layer.0.intermediate.dense.weight"  # [6, 4]
FUZZ = settings(derandomize=True, deadline=None, max_examples=150)


def words(**changed):
    """A tokenizer.json of whole words."""
    special = [{"id": i, "content": name, "special": True} for name, i in VOCABULARY.items() if name[0] == "["]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [token | flags for token in special],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "[UNK]"},
    } | changed


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A whole directory, never changed."""
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(TINY))
    (directory / "tokenizer.json").write_text(json.dumps(words()))
    (directory / "model.safetensors").write_bytes(WHOLE)
    return directory


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "model")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """bytes of a safetensors file -> parameters by flat name."""
    file = tmp_path_factory.mktemp("fuzz") / "model.safetensors"

    def read(data):
        file.write_bytes(data)
        params = weights.load(
            file.parent, CONFIG.tensors(), SHAPES, ignored=CONFIG.ignored, prefixes=("bert.", "roberta.", "distilbert.")
        )
        return {name: np.asarray(leaf) for name, leaf in flatten(params)}

    return read


@pytest.fixture(scope="module")
def expected(load):
    return load(WHOLE)


def one_line(error, *parts):
    text = str(error.value)
    assert text
    assert len(text.splitlines()) == 1, text
    assert any(part in text for part in parts), text
    return text


def refused_or_equal(load, expected, data):
    """True where it was refused."""
    try:
        found = load(data)
    except UserError as error:
        text = str(error)
        assert len(text.splitlines()) == 1, text
        assert "model.safetensors" in text or "tensor " in text
        return True
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape, found[name].tobytes()) == (value.dtype, value.shape, value.tobytes())
    return False


@settings(FUZZ, max_examples=400)
@given(st.integers(0, START - 1), st.integers(1, 255))
def test_a_changed_byte_of_the_header_changes_no_parameter(load, expected, at, by):
    data = bytearray(WHOLE)
    data[at] ^= by
    refused_or_equal(load, expected, bytes(data))


@FUZZ
@given(st.lists(st.tuples(st.integers(0, START - 1), st.sampled_from(b'0123456789"\\{}[],: n')), min_size=1, max_size=3))
def test_changed_characters_of_the_header_change_no_parameter(load, expected, changes):
    """Those that keep it JSON more often."""
    data = bytearray(WHOLE)
    for at, byte in changes:
        data[at] = byte
    refused_or_equal(load, expected, bytes(data))


def test_every_digit_of_every_shape_and_offset_counts(load, expected):
    """All of them, each one up: none passes."""
    for at in range(8, START):
        if WHOLE[at : at + 1].isdigit() and WHOLE[at - 1 : at] in b"[,0123456789":
            data = bytearray(WHOLE)
            data[at] = data[at] + 1 if data[at] < ord("9") else ord("0")
            assert refused_or_equal(load, expected, bytes(data)), WHOLE[at - 20 : at + 20]


@FUZZ
@given(st.integers(0, len(WHOLE) - 1))
def test_a_cut_file_is_refused(load, expected, length):
    assert refused_or_equal(load, expected, WHOLE[:length])


@FUZZ
@given(st.binary(min_size=1, max_size=64))
def test_a_file_with_more_at_its_end_is_refused(load, expected, more):
    assert refused_or_equal(load, expected, WHOLE + more)


@FUZZ
@given(st.binary(max_size=400))
def test_any_bytes_are_refused(load, expected, data):
    assert refused_or_equal(load, expected, data)
    assert refused_or_equal(load, expected, len(data).to_bytes(8, "little") + data)


@FUZZ
@given(st.sampled_from(sorted(STORED)), st.integers(0), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_one_number_that_is_none_is_found(load, name, at, value):
    changed = STORED[name].copy()
    changed.flat[at % changed.size] = value
    with pytest.raises(UserError) as error:
        load(save(STORED | {name: changed}))
    one_line(error, f"tensor {name} holds NaN or infinity")


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    save_text_encoder(load_text_encoder(str(model)), directory)
    return directory, (directory / "model.safetensors").read_bytes()


@settings(FUZZ, max_examples=100)
@given(at=st.integers(0, 10**6), by=st.integers(1, 255))
def test_a_changed_byte_is_found_by_the_digest(saved, at, by):
    directory, whole = saved
    data = bytearray(whole)
    data[at % len(whole)] ^= by
    (directory / "model.safetensors").write_bytes(data)
    sources._sha256.cache_clear()  # several changes within the clock's resolution
    with pytest.raises(UserError) as error:
        weights.files(directory)
    one_line(error, "its SHA-256 differs")


def test_a_file_that_changes_while_the_program_runs_is_read_again(copy, tmp_path):
    save_text_encoder(load_text_encoder(str(copy)), tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    first = load_text_encoder(str(file.parent)).fingerprint
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(1, 1))
    with pytest.raises(UserError, match="its SHA-256 differs"):
        load_text_encoder(str(file.parent))
    (file.parent / "digest.json").unlink()
    assert load_text_encoder(str(file.parent)).fingerprint != first


CONFIGS = {
    "empty": ("", "config.json is no valid JSON"),
    "not JSON": ("{'model_type': 'bert'}", "config.json is no valid JSON"),
    "cut": (json.dumps(TINY)[:-9], "config.json is no valid JSON"),
    "not text": (b"\xff\xfe\x00{", "config.json is no valid JSON"),
    "deep": ("[" * 10**5, "config.json is no valid JSON"),
    "a list": ("[]", "config.json holds no object"),
    "null": ("null", "config.json holds no object"),
    "a number": ("7", "config.json holds no object"),
    "no fields": ("{}", "model_type None is not known here"),
}
FIELDS = [
    ({"model_type": None}, "model_type None is not known here"),
    ({"model_type": "gru"}, "model_type 'gru' is not known here; known: bert"),
    ({"model_type": ["bert"]}, "model_type ['bert'] is not known here"),
    ({"model_type": {}}, "model_type {} is not known here"),
    ({"text_config": {}}, "model_type None is not known here"),
    ({"hidden_size": None}, "lacks hidden_size"),
    ({"vocab_size": "8"}, "vocab_size='8' makes no sense"),
    ({"vocab_size": 8.0}, "vocab_size=8.0 makes no sense"),
    ({"vocab_size": 10**12}, "vocab_size=1000000000000 makes no sense"),
    ({"vocab_size": True}, "vocab_size=True makes no sense"),
    ({"vocab_size": []}, "vocab_size=[] makes no sense"),
    ({"vocab_size": 9}, "tensor embeddings.word_embeddings.weight has shape [8, 4] and config.json asks for [9, 4]"),
    ({"hidden_size": "4"}, "makes no sense"),
    ({"hidden_size": {}}, "makes no sense"),
    ({"hidden_size": 0}, "hidden_size=0 makes no sense"),
    ({"hidden_size": -4}, "hidden_size=-4 makes no sense"),
    ({"hidden_size": 2**60}, "makes no sense"),
    ({"hidden_size": 2**27}, "and config.json asks for [8, 134217728]"),
    ({"num_attention_heads": 3}, "a width of 4 does not divide among 3 attention heads"),
    ({"num_attention_heads": 0}, "does not divide among 0 attention heads"),
    ({"num_attention_heads": -2}, "does not divide among -2 attention heads"),
    ({"num_attention_heads": 2.0}, "num_attention_heads=2.0 makes no sense"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0 makes no sense"),
    ({"num_hidden_layers": -1}, "num_hidden_layers=-1 makes no sense"),
    ({"num_hidden_layers": 1.5}, "num_hidden_layers=1.5 makes no sense"),
    ({"num_hidden_layers": 10**7}, "10000000 layers and 16 positions are no model's"),
    ({"num_hidden_layers": 2}, "layer.1.attention"),
    ({"intermediate_size": "six"}, "intermediate_size='six' makes no sense"),
    ({"intermediate_size": 7}, "dense.weight has shape [6, 4] and config.json asks for [7, 4]"),
    ({"max_position_embeddings": 1}, "1 layers and 1 positions are no model's"),
    ({"max_position_embeddings": -16}, "max_position_embeddings=-16 makes no sense"),
    ({"model_type": "roberta", "pad_token_id": 15}, "0 positions are no model's"),
    ({"type_vocab_size": 0}, "type_vocab_size=0 makes no sense"),
    ({"type_vocab_size": 3}, "token_type_embeddings.weight has shape [2, 4] and config.json asks for [3, 4]"),
    ({"pad_token_id": "0"}, "pad_token_id='0' makes no sense"),
    ({"pad_token_id": -2}, "pad_token_id=-2 makes no sense"),
    ({"layer_norm_eps": "tiny"}, "layer_norm_eps='tiny' makes no sense"),
    ({"layer_norm_eps": -1e-12}, "layer_norm_eps=-1e-12 makes no sense"),
    ({"layer_norm_eps": float("nan")}, "layer_norm_eps=nan makes no sense"),
    ({"layer_norm_eps": float("inf")}, "layer_norm_eps=inf makes no sense"),
    ({"hidden_act": "swish42"}, "hidden_act='swish42' is not supported; 'gelu'"),
    ({"hidden_act": {"gelu": 1}}, "hidden_act={'gelu': 1} is not supported"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' is not supported; 'absolute' is"),
    ({"is_decoder": True}, "is_decoder=True is not supported"),
]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_broken_config_is_told(copy, name):
    text, message = CONFIGS[name]
    (copy / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        load_text_encoder(str(copy))
    one_line(error, message)


@pytest.mark.parametrize(("fields", "message"), FIELDS, ids=[json.dumps(fields) for fields, _ in FIELDS])
def test_a_field_that_makes_no_sense_is_told(copy, fields, message):
    (copy / "config.json").write_text(json.dumps(TINY | fields))
    with pytest.raises(UserError) as error:
        load_text_encoder(str(copy))
    assert "config.json" in one_line(error, message) or "tensor" in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "t5", "d_model": "4"}, "lacks vocab_size"),
        ({"model_type": "t5", "d_kv": -1}, "d_kv=-1 makes no sense"),
        ({"model_type": "t5", "num_heads": 0}, "num_heads=0 makes no sense"),
        ({"model_type": "t5", "relative_attention_num_buckets": 2}, "do not divide distances"),
        ({"model_type": "t5", "relative_attention_num_buckets": "2"}, "makes no sense"),
        ({"model_type": "t5", "feed_forward_proj": "gated-none"}, "feed_forward_proj='gated-none' is not supported"),
        ({"model_type": "clip_text_model", "eos_token_id": "2"}, "eos_token_id='2'"),
        ({"model_type": "clip_text_model", "architectures": 3}, "makes no sense"),
        ({"model_type": "clip_text_model", "projection_dim": 0}, "projection_dim=0 makes no sense"),
        ({"model_type": "distilbert", "dim": "4"}, "lacks vocab_size, n_layers"),
        ({"model_type": "distilbert", "sinusoidal_pos_embds": True}, "sinusoidal_pos_embds=True is not supported"),
    ],
)
def test_so_are_those_of_other_architectures(copy, values, message):
    t5 = {"vocab_size": 8, "d_model": 4, "d_kv": 2, "d_ff": 6, "num_layers": 1, "num_heads": 2}
    (copy / "config.json").write_text(json.dumps((t5 if len(values) > 1 and "lacks" not in message else {}) | values))
    with pytest.raises(UserError) as error:
        load_text_encoder(str(copy))
    one_line(error, message)


def index(directory, text, **files):
    """An index instead of model.safetensors; `files` are tensors by file stem."""
    (directory / "model.safetensors").unlink()
    for stem, tensors in files.items():
        save_file(tensors, directory / f"{stem}.safetensors")
    (directory / "model.safetensors.index.json").write_text(text if isinstance(text, str) else json.dumps({"weight_map": text}))


HALF = {name: STORED[name] for name in sorted(STORED)[:9]}
REST = {name: STORED[name] for name in sorted(STORED)[9:]}
INDEXES = [
    ("", {}, "is no valid index"),
    ("[" * 10**5, {}, "is no valid index"),
    ("null", {}, "is no valid index"),
    ('"a"', {}, "is no valid index"),
    ('{"weight_map": [["a", "b"]]}', {}, "is no valid index"),
    ('{"weight_map": {"a": ["x.safetensors"]}}', {}, "is no valid index"),
    ('{"weight_map": {"a": {"b": 1}}}', {}, "is no valid index"),
    ({"a": 1}, {}, "1 is missing, which"),
    ({}, {}, "tensor embeddings.LayerNorm.bias is missing"),
    ({"a": "b.safetensors"}, {}, "b.safetensors is missing, which"),
    ({"a": "/etc/passwd"}, {}, "passwd is missing, which"),
    ({"a": "../model/config.json"}, {}, "config.json is missing, which"),
    ({"a": ".."}, {}, ".. is missing, which"),
    ({"a": ""}, {}, "is missing, which"),
    ({"a": "x\ny"}, {}, "is missing, which"),
    ({"a": "config.json"}, {}, "config.json is no whole safetensors file"),
    (dict.fromkeys(HALF, "a.safetensors"), {"a": HALF}, "is missing and"),
    (
        dict.fromkeys(STORED, "a.safetensors") | {QUERY: "b.safetensors"},
        {"a": STORED, "b": {QUERY: STORED[QUERY]}},
        f"tensor {QUERY} is there twice, the other is {QUERY} in",
    ),
    (
        dict.fromkeys(STORED, "a.safetensors") | {"more": "b.safetensors"},
        {"a": STORED, "b": {"more": STORED[QUERY]}},
        "tensor more belongs to no part",
    ),
]


@pytest.mark.parametrize(("text", "files", "message"), INDEXES, ids=range(len(INDEXES)))
def test_a_broken_index_is_told(copy, text, files, message):
    index(copy, text, **files)
    with pytest.raises(UserError) as error:
        load_text_encoder(str(copy))
    one_line(error, message)


def test_names_twice_in_an_index_change_nothing(copy):
    before = load_text_encoder(str(copy))("a red circle")
    lines = [f'"{name}": "a.safetensors"' for name in HALF] + [f'"{name}": "b.safetensors"' for name in REST]
    index(copy, f'{{"weight_map": {{{", ".join([*lines, *lines])}}}}}', a=HALF, b=REST)
    np.testing.assert_array_equal(load_text_encoder(str(copy))("a red circle").hidden, before.hidden)


def raw(entries, data):
    """A safetensors file by hand."""
    header = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


WHOLE_HEADER = json.loads(WHOLE[8:START])


def header(edit):
    """The whole file with another header."""
    entries = json.loads(WHOLE[8:START])
    edit(entries)
    return raw(entries, WHOLE[START:])


def tensors(edit):
    changed = dict(STORED)
    edit(changed)
    return save(changed)


BEGIN, END = WHOLE_HEADER[QUERY]["data_offsets"]
BROKEN = "is no whole safetensors file"
FILES = {
    "empty": (b"", BROKEN),
    "only a length": (WHOLE[:8], BROKEN),
    "only a header": (WHOLE[:START], BROKEN),
    "header too long": ((2**40).to_bytes(8, "little") + WHOLE[8:], BROKEN),
    "header of 2^64 - 1": (b"\xff" * 8 + WHOLE[8:], BROKEN),
    "a pickle by name": (b"\x80\x04K\x01.", BROKEN),
    "a zip file": (b"PK\x03\x04" + bytes(100), BROKEN),
    "a list for a header": (raw("[]", b""), BROKEN),
    "no tensors": (raw("{}", b""), "tensor embeddings.LayerNorm.bias is missing and"),
    "overlap": (header(lambda h: h[QUERY].update(data_offsets=[BEGIN - 4, END - 4])), BROKEN),
    "gap": (header(lambda h: h.pop(QUERY)), BROKEN),
    "backwards": (header(lambda h: h[QUERY].update(data_offsets=[END, BEGIN])), BROKEN),
    "negative": (header(lambda h: h[QUERY].update(data_offsets=[-1, 63])), BROKEN),
    "beyond": (header(lambda h: h[QUERY].update(data_offsets=[2**40, 2**40 + 64])), BROKEN),
    "overflow": (header(lambda h: h[QUERY].update(shape=[2**40, 2**40])), BROKEN),
    "no such dtype": (header(lambda h: h[QUERY].update(dtype="F31")), BROKEN),
    "half the bytes": (header(lambda h: h[QUERY].update(dtype="F16")), BROKEN),
    "metadata": (header(lambda h: h.update(__metadata__={"a": 1})), BROKEN),
    "I32": (header(lambda h: h[QUERY].update(dtype="I32")), f"tensor {QUERY} is I32, not a floating-point"),
    "U32": (header(lambda h: h[QUERY].update(dtype="U32")), f"tensor {QUERY} is U32, not a floating-point"),
    "I64": (tensors(lambda t: t.update({QUERY: np.zeros((4, 4), np.int64)})), "is I64, not a floating-point"),
    "BOOL": (tensors(lambda t: t.update({QUERY: np.zeros((4, 4), bool)})), "is BOOL, not a floating-point"),
    "C64": (header(lambda h: h[QUERY].update(dtype="C64", shape=[4, 2])), "is C64, not a floating-point"),
    "F8_E4M3": (header(lambda h: h[QUERY].update(dtype="F8_E4M3", shape=[4, 16])), "is F8_E4M3, not a floating-point"),
    "F8_E5M2": (header(lambda h: h[QUERY].update(dtype="F8_E5M2", shape=[4, 16])), "is F8_E5M2, not a floating-point"),
    "F4": (header(lambda h: h[QUERY].update(dtype="F4", shape=[8, 16])), "is F4, not a floating-point"),
    "a scalar": (
        tensors(lambda t: t.update({"embeddings.LayerNorm.bias": np.zeros((), np.float32)})),
        "tensor embeddings.LayerNorm.bias has shape [] and config.json asks for [4]",
    ),
    "transposed": (tensors(lambda t: t.update({UP: t[UP].T.copy()})), f"tensor {UP} has shape [4, 6]"),
    "flat": (tensors(lambda t: t.update({UP: t[UP].ravel()})), f"tensor {UP} has shape [24]"),
    "one axis more": (tensors(lambda t: t.update({UP: t[UP][None]})), f"tensor {UP} has shape [1, 6, 4]"),
    "nothing in it": (tensors(lambda t: t.update({UP: t[UP][:0]})), f"tensor {UP} has shape [0, 4]"),
    "beyond float32": (tensors(lambda t: t.update({UP: np.full((6, 4), 1e200)})), f"tensor {UP} holds NaN or infinity"),
    "twice by prefix": (tensors(lambda t: t.update({f"bert.{UP}": t[UP]})), "is there twice"),
    "surplus": (tensors(lambda t: t.update({"new.weight": t[UP]})), "tensor new.weight belongs to no part"),
    "surplus in two lines": (tensors(lambda t: t.update({"new\nline": t[UP]})), r"tensor 'new\nline' belongs to no part"),
    "another prefix": (
        save({f"gru.{name}": value for name, value in STORED.items()}),
        "belongs to no part of this architecture",
    ),
    "missing": (tensors(lambda t: t.pop(UP)), f"tensor {UP} is missing; download"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_broken_weight_file_is_told(copy, name):
    data, message = FILES[name]
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError) as error:
        load_text_encoder(str(copy))
    one_line(error, message)


def test_large_numbers_whose_sum_overflows_are_finite(load, expected):
    """And numpy warns of nothing."""
    found = load(tensors(lambda t: t.update({UP: np.full((6, 4), 3e38, np.float32)})))
    np.testing.assert_array_equal(found["layers.0.up.kernel"], np.full((4, 6), 3e38, np.float32))


def template(identity):
    """A post-processor that puts [CLS] in front, as `identity`."""
    special = {"[CLS]": {"id": "[CLS]", "ids": [identity], "tokens": ["[CLS]"]}}
    pieces = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special}


def vocabulary(**more):
    return {"type": "WordLevel", "vocab": VOCABULARY | more, "unk_token": "[UNK]"}


ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
TOKENIZERS = {
    "empty": ("", "tokenizer.json is no valid tokenizer"),
    "not JSON": ("not JSON", "tokenizer.json is no valid tokenizer"),
    "not text": (b"\xff\xfe\xfd", "tokenizer.json is no valid tokenizer"),
    "cut": (json.dumps(words())[:-40], "tokenizer.json is no valid tokenizer"),
    "a list": ("[]", "tokenizer.json is no valid tokenizer"),
    "no model": (json.dumps({"version": "1.0"}), "tokenizer.json is no valid tokenizer"),
    "unknown model": (json.dumps(words(model={"type": "Magic"})), "tokenizer.json is no valid tokenizer"),
    "another vocabulary": (
        json.dumps(words(model=vocabulary(square=8))),
        "the tokenizer has a token with id 8, and the embedding of the weights 8 rows",
    ),
    "far beyond": (json.dumps(words(model=vocabulary(square=10**6))), "a token with id 1000000, and"),
    "in its template": (json.dumps(words(post_processor=template(99))), "a token with id 99, and"),
    "an added word": (
        json.dumps(words(added_tokens=[*words()["added_tokens"], ADDED | {"id": 8, "content": "ring", "special": False}])),
        "a token with id 8, and",
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_broken_tokenizer_is_told(copy, name):
    text, message = TOKENIZERS[name]
    (copy / "tokenizer.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        load_text_encoder(str(copy))
    one_line(error, message)


def test_a_special_token_beyond_the_embedding_is_refused_only_where_a_caption_has_it(copy):
    """Text-only models have their relatives' tokens for pictures."""
    before = load_text_encoder(str(copy))("a red circle")
    more = [*words()["added_tokens"], ADDED | {"id": 8, "content": "<picture>", "special": True}]
    (copy / "tokenizer.json").write_text(json.dumps(words(added_tokens=more)))
    encoder = load_text_encoder(str(copy))
    np.testing.assert_array_equal(encoder("a red circle").hidden, before.hidden)
    for call in (encoder, encoder.count, lambda captions: load_text_encoder(str(copy), template="<picture> {}")(["red"])):
        with pytest.raises(UserError) as error:
            call(["a red circle", "a red <picture> circle"])
        one_line(error, "a caption has the special token <picture>, which these weights were not trained with")


OTHERS = [
    ("tokenizer_config.json", "{", "tokenizer_config.json is no valid JSON"),
    ("tokenizer_config.json", "[]", "tokenizer_config.json holds no such thing as a dict"),
    ("special_tokens_map.json", "{'pad_token'", "special_tokens_map.json is no valid JSON"),
    ("special_tokens_map.json", "3", "special_tokens_map.json holds no such thing"),
    ("sentence_bert_config.json", "", "sentence_bert_config.json is no valid JSON"),
    ("sentence_bert_config.json", "[256]", "sentence_bert_config.json holds no such thing"),
    ("1_Pooling/config.json", "{", "config.json is no valid JSON"),
    ("1_Pooling/config.json", "[]", "config.json holds no object"),
    ("1_Pooling/config.json", "{}", "no mode is not supported"),
    ("1_Pooling/config.json", '{"pooling_mode_max_tokens": true}', "pooling_mode_max_tokens is not supported"),
    ("1_Pooling/config.json", '{"pooling_mode_mean_tokens": "yes"}', "no mode is not supported"),
    (
        "1_Pooling/config.json",
        '{"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true}',
        "pooling_mode_mean_tokens, pooling_mode_cls_token is not supported",
    ),
    ("modules.json", "{}", "modules.json holds no such thing as a list"),
    ("modules.json", '["Normalize"]', "modules.json is no list of modules"),
    ("modules.json", "[", "modules.json is no valid JSON"),
    ("digest.json", "{", "digest.json is no valid JSON"),
    ("digest.json", "[]", "digest.json holds no object"),
    ("digest.json", "null", "digest.json holds no object"),
    ("digest.json", "{}", "is not the file that digest.json was made for (its SHA-256 is not there)"),
    ("digest.json", '{"model.safetensors": 3}', "(its SHA-256 differs)"),
    ("digest.json", '{"model.safetensors": ""}', "(its SHA-256 differs)"),
]


@pytest.mark.parametrize(("name", "text", "message"), OTHERS, ids=range(len(OTHERS)))
def test_other_broken_files_are_told(copy, name, text, message):
    (copy / "1_Pooling").mkdir()
    (copy / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (copy / name).write_text(text)
    with pytest.raises(UserError) as error:
        load_text_encoder(str(copy))
    one_line(error, message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "config.json is missing: "),
        ("tokenizer.json", "has no tokenizer: tokenizer.json"),
        ("model.safetensors", "has no model.safetensors"),
    ],
)
def test_a_file_that_is_missing_or_a_directory_is_told(copy, name, message):
    (copy / name).unlink()
    with pytest.raises(UserError) as error:
        load_text_encoder(str(copy))
    one_line(error, message)
    (copy / name).mkdir()
    with pytest.raises(UserError) as error:
        load_text_encoder(str(copy))
    assert str(copy) in one_line(error, "cannot be read", "is no whole safetensors file", "has no tokenizer")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "tokenizer_config.json", "digest.json"])
def test_a_file_that_may_not_be_read_is_told(copy, name):
    (copy / name).touch()
    (copy / name).chmod(0)
    if os.access(copy / name, os.R_OK):
        pytest.skip("root may read everything")
    with pytest.raises(UserError) as error:
        load_text_encoder(str(copy))
    assert name in one_line(error, "cannot be read", "is no whole safetensors file", "is no valid tokenizer")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "training_args.bin"])
def test_pickles_are_not_read(copy, name):
    (copy / "model.safetensors").rename(copy / name)
    with pytest.raises(UserError) as error:
        load_text_encoder(str(copy))
    one_line(error, f"has only {name}, a pickle")


def test_several_files_without_an_index_are_told(copy):
    shutil.copy(copy / "model.safetensors", copy / "a.safetensors")
    (copy / "model.safetensors").rename(copy / "b.safetensors")
    with pytest.raises(UserError) as error:
        load_text_encoder(str(copy))
    one_line(error, "has a.safetensors, b.safetensors and no index")
    load_text_encoder(str(copy / "b.safetensors"))


def test_a_directory_may_be_named_like_a_file(copy):
    named = copy.rename(copy.with_name("bert.safetensors"))
    assert load_text_encoder(str(named)).hidden_size == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 1}, "max_length=1:"),
        ({"max_length": 17}, "takes from 2 to 16 tokens"),
        ({"max_length": -3}, "max_length=-3:"),
        ({"max_length": 8.5}, "max_length=8.5:"),
        ({"max_length": "8"}, "max_length=8:"),
        ({"layers": 2}, "an index from -2 to 1"),
        ({"layers": -3}, "an index from -2 to 1"),
        ({"layers": ()}, "an index from -2 to 1"),
        ({"layers": [0, 1]}, "an index from -2 to 1"),
        ({"layers": (0, "last")}, "an index from -2 to 1"),
        ({"layers": None}, "layers=None"),
        ({"layers": "all"}, "layers='all'"),
        ({"template": ""}, "needs {} once"),
        ({"template": "no place"}, "needs {} once"),
        ({"template": "{} and {}"}, "needs {} once"),
        ({"subfolder": "text_encoder_9"}, "text.subfolder=text_encoder_9: "),
        ({"subfolder": "config.json"}, "text.subfolder=config.json: "),
        ({"tokenizer": "./nowhere"}, "no such directory"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_told(model, arguments, message):
    with pytest.raises(UserError) as error:
        load_text_encoder(str(model), **arguments)
    one_line(error, message)


@pytest.mark.parametrize(
    "source", ["./nowhere", "~nobody-of-this-name/x/y", "x" * 5000, "a/b c?", "a/" + "x" * 300, "a\0/b"], ids=range(6)
)
def test_sources_that_are_none_are_told(source):
    with pytest.raises(UserError) as error:
        load_text_encoder(source)
    one_line(error, "no such directory", "nor downloaded")


def test_one_file_has_no_subfolder(model):
    with pytest.raises(UserError) as error:
        load_text_encoder(str(model / "model.safetensors"), subfolder="text_encoder")
    one_line(error, "no such directory")
