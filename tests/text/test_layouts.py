"""Directories and files as they are published: names, prefixes, number formats, shards, tokenizers."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from jaxgen.errors import UserError
from jaxgen.nn.module import flatten
from jaxgen.text import load_text_encoder, save_text_encoder, sentencepiece
from jaxgen.text.encoder import load_pretrained
from jaxgen.text.tokenizer import Tokenizer as Words
from tests.text.cases import REFERENCES, Case, write

SPIECE = REFERENCES / "spiece"
CAPTIONS = ["a red circle", "two small dogs in the snow and a house"]
WORDS = ["a", "the", "red", "blue", "small", "large", "circle", "square", "dog", "dogs", "house", "snow", "in", "and", "two"]
ENDS = {"clip_l": 96, "clip_h": 95, "clip_bigg": 95, "clip_full": 95}  # ids of the token at the end; 1 for the rest


def write_tokenizer(directory, end=1, **settings):
    """A tokenizer.json of 97 words that puts the token `end` behind each caption."""
    special = {0: "<pad>", 2: "<unk>", end: "</s>"}
    rest = iter([*WORDS, *(f"word{i}" for i in range(97))])
    vocabulary = {special.get(i) or next(rest): i for i in range(97)}
    made = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(list(special.values()))
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    directory.mkdir(exist_ok=True)
    made.save(str(directory / "tokenizer.json"))
    if settings:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def write_clip_vocabulary(directory):
    """CLIP's older files: byte pairs, "</w>" ends a word."""
    letters = [chr(i) for i in range(97, 123)]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "re", "red</w>", "do", "dog</w>", "<|startoftext|>", "<|endoftext|>"]
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (directory / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\nd o\ndo g</w>\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 12, "pad_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokens


@pytest.fixture
def make(tmp_path):
    """make(case, name) -> a new whole directory with that case's model."""

    def build(case, name="model"):
        directory = tmp_path / name
        directory.mkdir(parents=True)
        Case(case).write(directory)
        write_tokenizer(directory, ENDS.get(case, 1))
        return directory

    return build


def features(source, **options):
    text = load_text_encoder(str(source), **options)(CAPTIONS)
    return [np.asarray(a) for a in (text.hidden, text.pooled, text.mask)]


def model(source, **options):
    """(architecture, parameters by name): all that features hang on, and nothing is compiled for it."""
    read = load_pretrained(str(source), **options)
    return read.architecture, {name: np.asarray(leaf) for name, leaf in flatten(read.params)}


def assert_same_tokens(ours, theirs):
    assert_same(ours.tokenize(CAPTIONS).values(), theirs.tokenize(CAPTIONS).values())
    assert (ours.max_length, ours.tokenizer.padding) == (theirs.max_length, theirs.tokenizer.padding)


def assert_same_model(ours, theirs):
    assert ours[0] == theirs[0]
    assert ours[1].keys() == theirs[1].keys()
    assert_same(ours[1].values(), theirs[1].values())


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a, b)


def weights_of(directory):
    return load_file(directory / "model.safetensors")


def rewrite(directory, flat, name="model.safetensors"):
    save_file(flat, directory / name, metadata={"format": "pt"})


def test_diffusers_keeps_tokenizers_beside_the_encoders(make, tmp_path):
    make("clip_l", "pipeline/text_encoder")
    second = make("clip_bigg", "pipeline/text_encoder_2")
    pipeline = second.parent
    for name in ("text_encoder", "text_encoder_2"):
        (pipeline / name / "tokenizer.json").unlink()
        (pipeline / name.replace("text_encoder", "tokenizer")).mkdir()
    tokens = write_clip_vocabulary(pipeline / "tokenizer")
    write_tokenizer(pipeline / "tokenizer_2", 95, pad_token="word7", model_max_length=9)

    first = load_text_encoder(str(pipeline), subfolder="text_encoder")
    ids = first.tokenize(["red dog at"])["input_ids"][0]
    named = ["<|startoftext|>", "red</w>", "dog</w>", "a", "t</w>", "<|endoftext|>", "<|endoftext|>", "<|endoftext|>"]
    assert [tokens[i] for i in ids] == named
    assert (first.max_length, first.pooled_size) == (12, 32)

    other = load_text_encoder(str(pipeline), subfolder="text_encoder_2", layers=-2)
    ids = other.tokenize(["a red circle"])["input_ids"][0]
    assert ids[:4].tolist() == [1, 4, 8, 95]
    assert set(ids[4:]) == {other.tokenizer.padding} != {0}
    assert (other.max_length, other.hidden_size, other.pooled_size) == (9, 32, 24)
    assert_same_model(model(pipeline / "text_encoder_2"), model(pipeline, subfolder="text_encoder_2"))
    assert_same_tokens(load_text_encoder(str(pipeline / "text_encoder_2")), other)

    with pytest.raises(UserError, match=r"text\.subfolder=text_encoder_3: .* has no such directory"):
        load_text_encoder(str(pipeline), subfolder="text_encoder_3")
    save_text_encoder(other, tmp_path / "saved")
    assert_same(features(tmp_path / "saved", layers=-2), features(second, layers=-2))


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "diffusion_pytorch_model.safetensors", "whole.safetensors"])
def test_the_only_file_is_read_whatever_its_name(make, name):
    directory = make("clip_h")
    before = model(directory)
    (directory / "model.safetensors").rename(directory / name)
    assert_same_model(model(directory), before)
    assert_same_model(model(directory / name), before)


def test_a_file_can_be_the_source(make):
    directory = make("t5")
    before = model(directory)
    flat = {key: value * np.float32(0.5) for key, value in weights_of(directory).items()}
    rewrite(directory, flat, "model.half.safetensors")
    assert_same_model(model(directory), before)
    half = model(directory / "model.half.safetensors")[1]
    assert_same(half.values(), [value * np.float32(0.5) for value in before[1].values()])
    (directory / "model.safetensors").rename(directory / "other.safetensors")
    with pytest.raises(UserError, match=r"has model\.half\.safetensors, other\.safetensors and no index: give the one"):
        load_text_encoder(str(directory))
    assert_same_model(model(directory / "other.safetensors"), before)


@pytest.mark.parametrize("case", ["clip_bigg", "t5_v11"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_are_their_rounded_numbers(make, case, dtype):
    directory = make(case)
    half = {key: value.astype(dtype) for key, value in weights_of(directory).items()}
    rewrite(directory, half)
    read = model(directory)
    assert {leaf.dtype for leaf in read[1].values()} == {np.dtype(np.float32)}
    rewrite(directory, {key: value.astype(np.float32) for key, value in half.items()})
    assert_same_model(read, model(directory))


@pytest.mark.parametrize("case", ["bert", "clip_full", "t5_full"])
def test_shards_are_one_model(make, case):
    directory = make(case)
    before, flat = model(directory), weights_of(directory)
    names = sorted(flat)
    parts = {f"model-{i + 1:05d}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, some in parts.items():
        rewrite(directory, {key: flat[key] for key in some}, file)
    index = {"metadata": {"total_size": 1}, "weight_map": {key: file for file, some in parts.items() for key in some}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()
    assert_same_model(model(directory), before)


def plain(case):
    """The names without what stands before them."""
    prefixes = ("text_model.", "bert.", "roberta.", "distilbert.")
    shapes = json.loads(str(Case(case).stored["tensors"]))
    return {next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name): name for name in shapes}


def other(*names):
    """Tensors that an encoder does not read; it must not look at their numbers."""
    return {name: np.full((2, 3), np.nan, np.float32) for name in names}


MLM = other("cls.predictions.bias", "cls.predictions.decoder.weight", "cls.seq_relationship.weight")
VISION = other("vision_model.embeddings.class_embedding", "visual_projection.weight", "logit_scale")
DECODER = other("decoder.block.0.layer.1.EncDecAttention.q.weight", "decoder.embed_tokens.weight", "lm_head.weight")
SHARED, OWN = "shared.weight", "encoder.embed_tokens.weight"


@pytest.mark.parametrize(
    ("case", "rename", "more"),
    [
        ("bert", "{}", other("embeddings.position_ids", "pooler.dense.weight")),
        ("bert", "bert.{}", MLM | other("bert.embeddings.position_ids", "bert.pooler.dense.bias")),
        ("roberta", "{}", other("pooler.dense.weight")),
        ("roberta", "roberta.{}", other("lm_head.dense.weight", "lm_head.bias", "roberta.embeddings.position_ids")),
        ("xlm_roberta", "roberta.{}", other("lm_head.decoder.weight")),
        ("distilbert", "distilbert.{}", other("vocab_transform.weight", "vocab_projector.bias")),
        ("clip_l", "{}", other("embeddings.position_ids")),
        ("clip_l", "text_model.{}", other("text_model.embeddings.position_ids", "text_projection.weight")),
        ("clip_h", "text_model.{}", VISION),
        ("t5", "transformer.{}", other("classification_head.dense.weight")),
        ("t5", "{}", DECODER),
        ("umt5", "{}", DECODER),
    ],
)
def test_names_come_with_and_without_prefix_and_company(make, case, rename, more):
    directory = make(case)
    before, flat = model(directory), weights_of(directory)
    rewrite(directory, {rename.format(key): flat[name] for key, name in plain(case).items()} | more)
    assert_same_model(model(directory), before)


@pytest.mark.parametrize("case", ["t5", "mt5"])
@pytest.mark.parametrize("names", [(SHARED,), (OWN,), (SHARED, OWN), ("transformer." + OWN,)])
def test_t5_shares_its_embeddings_under_either_name(make, case, names):
    directory = make(case)
    before, flat = model(directory), weights_of(directory)
    table = flat.pop(SHARED)
    rewrite(directory, flat | {name: table.copy() for name in names})
    assert_same_model(model(directory), before)
    rewrite(directory, flat)
    with pytest.raises(UserError, match=r"tensor shared\.weight is missing"):
        load_text_encoder(str(directory))


def test_a_whole_clip_holds_a_text_encoder_with_projection(make):
    """clip_full without its other half is a CLIPTextModelWithProjection."""
    whole = make("clip_full", "whole")
    before, flat = model(whole), weights_of(whole)
    text = make("clip_l", "text")
    values = json.loads((whole / "config.json").read_text())
    inner = values["text_config"] | {"projection_dim": 24, "architectures": ["CLIPTextModelWithProjection"]}
    (text / "config.json").write_text(json.dumps(inner | {"model_type": "clip_text_model"}))
    write_tokenizer(text, 95)
    rewrite(text, {key: value for key, value in flat.items() if key.startswith("text_")})
    assert_same_model(model(text), before)
    rewrite(text, {key: value for key, value in flat.items() if key.startswith("text_model")})
    with pytest.raises(UserError, match=r"tensor text_projection\.weight is missing"):
        load_text_encoder(str(text))


def test_surplus_tensors_are_told(make):
    for case in ("clip_l", "t5"):
        directory = make(case, case)
        rewrite(directory, weights_of(directory) | other("encoder.surprise"))
        with pytest.raises(UserError, match=r"encoder\.surprise belongs to no part"):
            load_text_encoder(str(directory))


@pytest.mark.parametrize("case", ["bert", "roberta", "clip_l", "clip_bigg", "clip_full", "t5_full", "umt5"])
def test_what_is_saved_is_what_was_loaded(make, tmp_path, case):
    directory = make(case)
    encoder, original = load_text_encoder(str(directory)), weights_of(directory)
    save_text_encoder(encoder, tmp_path / "once")
    assert_same_model(model(tmp_path / "once"), model(directory))
    if case == "clip_full":
        assert_same(features(tmp_path / "once"), features(directory))
    assert_same_tokens(load_text_encoder(str(tmp_path / "once")), encoder)
    flat = weights_of(tmp_path / "once")
    theirs = {key: original.get(key, original.get(key.removeprefix("text_model."))) for key in flat}
    assert_same(flat.values(), theirs.values())
    save_text_encoder(load_text_encoder(str(tmp_path / "once")), tmp_path / "twice")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "digest.json"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    file = tmp_path / "once" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"is not the file that digest\.json was made for"):
        load_text_encoder(str(tmp_path / "once"))


def test_spiece_gives_the_ids_of_transformers():
    """ids.json is what its T5Tokenizer makes of the file, which sentencepiece trained with rules such as U+FB01 -> "fi"."""
    stored = json.loads((SPIECE / "ids.json").read_text())
    words = Words(SPIECE)
    assert words.encode(stored["sentences"], 1000) == stored["ids"]
    assert (words.padding, words.end) == (0, 1)
    assert words.decode(stored["ids"][0]) == stored["sentences"][0]
    assert words.unknown_fraction("日 本") == pytest.approx(0.5)  # "▁" is known
    assert words.encode(["red " * 50], 8)[0][-1] == 1


def test_t5_with_spiece_alone(tmp_path):
    """Loads, encodes, and saves its tokenizer with it."""
    stored = Case("t5").stored
    shapes = {key: tuple(shape) for key, shape in json.loads(str(stored["tensors"])).items()}
    directory = tmp_path / "text_encoder"
    directory.mkdir()
    write(directory, json.loads(str(stored["config"])) | {"vocab_size": 180}, shapes | {SHARED: (180, 32)})
    beside = tmp_path / "tokenizer"
    beside.mkdir()
    for name in ("spiece.model", "tokenizer_config.json"):
        shutil.copy(SPIECE / name, beside)
    encoder = load_text_encoder(str(tmp_path), subfolder="text_encoder")
    first = json.loads((SPIECE / "ids.json").read_text())["ids"][0]
    assert encoder.tokenize(["a red circle on a blue square"])["input_ids"][0].tolist() == first
    save_text_encoder(encoder, tmp_path / "saved")
    assert (tmp_path / "saved" / "spiece.model").is_file()
    assert_same_model(model(tmp_path / "saved"), model(tmp_path, subfolder="text_encoder"))
    assert_same_tokens(load_text_encoder(str(tmp_path / "saved")), encoder)


def test_a_broken_spiece_is_told(tmp_path):
    whole = (SPIECE / "spiece.model").read_bytes()
    file = tmp_path / "spiece.model"
    for data in (whole[:100], whole[:-1], b"\x0f", b"\x0a\x02\x12\x00", b"not a tokenizer", b"\x0a\x05\x0a\x03\xff\xff\xff"):
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"spiece\.model is no (valid tokenizer|unigram vocabulary)"):
            sentencepiece.read(file)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="is no unigram vocabulary"):
        sentencepiece.read(file)
    file.write_bytes(whole)
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": 3}')
    assert sentencepiece.read(file).get_vocab_size() == 163
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": "many"}')
    with pytest.raises(UserError, match="is no valid tokenizer"):
        sentencepiece.read(file)
    with pytest.raises(UserError, match="no tokenizer"):
        Words(Path(tmp_path / "nowhere"))
