"""A configuration's `text` section: what it says, how it travels, and that the encoder made of it is the API's."""

import dataclasses

import numpy as np
import pytest

from jaxgen import config as configs
from jaxgen.errors import UserError
from jaxgen.text import PairedTextEncoder, TextConfig, load_text_encoder, scratch
from jaxgen.text.adapt import LoRA
from jaxgen.text.config import SecondEncoder
from jaxgen.train.config import RunConfig
from jaxgen.train.loop import featurize

CAPTIONS = ["a red circle", "two dogs", "a blue square above a red circle"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two tiny encoders, the second's files in a subfolder."""
    place = tmp_path_factory.mktemp("encoders")
    scratch.write(place / "first", CAPTIONS, hidden_size=8, layers=3, vocab=90, max_length=16)
    scratch.write(place / "pipeline" / "text_encoder_2", CAPTIONS, hidden_size=12, layers=2, vocab=90, max_length=8, seed=1)
    return str(place / "first"), str(place / "pipeline")


def changed(*overrides):
    config = configs.finalize(configs.apply_overrides(RunConfig(), [f"text.{override}" for override in overrides]))
    assert configs.from_dict(RunConfig, configs.to_dict(config)) == config
    return config.text


def same(a, b):
    np.testing.assert_array_equal(a.mask, b.mask)
    np.testing.assert_allclose(a.hidden, b.hidden, atol=1e-6)
    np.testing.assert_allclose(a.pooled, b.pooled, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "layers"),
    [("last", "last"), ("average", "average"), ("-2", -2), ("0", 0), ("1,2", (1, 2)), ("(1, 2, 3)", (1, 2, 3)), ("2,", (2,))],
)
def test_layers_are_written_as_they_are_meant(text, layers):
    assert changed(f"layers={text}").layers == layers
    assert changed("second=encoder", "second.source=here", f"second.layers={text}").second.layers == layers


def test_its_encoder_is_that_of_the_api(sources):
    first, pipeline = sources
    config = changed(f"source={first}", "layers=1,-1", "max_length=9", "template=draw {} now")
    encoder = config.load()
    plain = load_text_encoder(first, layers=(1, -1), max_length=9, template="draw {} now")
    same(encoder(CAPTIONS), plain(CAPTIONS))
    assert (encoder.fingerprint, encoder.hidden_size, encoder.max_length) == (plain.fingerprint, 16, 9)
    config = changed(f"source={pipeline}", "subfolder=text_encoder_2", f"tokenizer={first}", "layers=average")
    plain = load_text_encoder(pipeline, subfolder="text_encoder_2", tokenizer=first, layers="average")
    same(config.load()(CAPTIONS), plain(CAPTIONS))
    assert config.load().fingerprint == plain.fingerprint


@pytest.mark.parametrize("along", ["features", "tokens"])
def test_a_second_one_reads_beside_it(sources, along):
    first, pipeline = sources
    settings = (f"source={pipeline}", "subfolder=text_encoder_2", "layers=-2", "template=a picture of {}", f"along={along}")
    config = changed(f"source={first}", "second=encoder", *(f"second.{setting}" for setting in settings))
    assert config.second == SecondEncoder(pipeline, "text_encoder_2", layers=-2, template="a picture of {}", along=along)
    encoder = config.load()
    second = load_text_encoder(pipeline, subfolder="text_encoder_2", layers=-2, template="a picture of {}")
    pair = PairedTextEncoder(load_text_encoder(first), second, along)
    same(encoder(CAPTIONS), pair(CAPTIONS))
    assert encoder.fingerprint == pair.fingerprint
    # In the step, rows have one length for all batches.
    ready = featurize(encoder, None, type("Source", (), {"captions": lambda self: CAPTIONS})())
    batch, whole = ready({"image": None, "caption": CAPTIONS[1:2]}), pair.tokenize(CAPTIONS)
    for name, rows in whole.items():
        np.testing.assert_array_equal(batch[name], rows[1:2])


@pytest.mark.parametrize("order", [1, -1])
def test_a_caption_may_be_longer_than_one_of_a_pair_reads(sources, order):
    """The shorter one's places end at 8 tokens; the longer one takes 10, and a template's besides."""
    short = load_text_encoder(sources[1], subfolder="text_encoder_2")
    wide = load_text_encoder(sources[0], max_length=10, template="a red dogs {}")
    pair = PairedTextEncoder(*(short, wide)[::order], "tokens")
    long = "a red circle " * 20
    text = pair([long])
    assert np.isfinite(text.hidden).all()
    assert int(text.mask.sum()) == 8 + 10 == int(pair.count([long])[0]) - wide.tokenizer.cut + 8
    alone = np.asarray(wide([long]).hidden)[0]
    np.testing.assert_allclose(text.hidden[0, 8:18, :8] if order > 0 else text.hidden[0, :10, :8], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["source="], "text.source is empty"),
        (["layers=first"], 'text.layers=\'first\': "last", "average", the index of a hidden state, or several: 9,18,27'),
        (["layers="], "text.layers=()"),
        (["template=no place"], "text.template='no place' needs {} once"),
        (["template={} {}"], "needs {} once"),
        (["second=encoder"], "text.second.source is empty"),
        (["second=encoder", "second.source=x", "second.layers=first"], "text.second.layers='first'"),
        (["second=encoder", "second.source=x", "second.template=no"], "text.second.template='no' needs {} once"),
        (["second=encoder", "second.source=x", "adapt=lora"], "text.adapt trains one encoder, not a pair"),
        (["second=encoder", "second.source=x", "second.along=rows"], "not one of features, tokens"),
        (["second.source=x"], "is a value and has no field 'source'"),
        (["second=bert"], "text.second=bert: not"),
    ],
)
def test_what_makes_no_sense_is_told_in_one_line(overrides, message):
    with pytest.raises(UserError) as error:
        changed(*overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_the_model_lacks_is_told(sources):
    for fields, message in (
        ({"layers": 9}, "layers=9: .* an index from -4 to 3"),
        ({"subfolder": "text_encoder_3"}, "text.subfolder=text_encoder_3"),
        ({"max_length": 99}, "text.max_length=99: .* takes from 2 to 16 tokens"),
        ({"tokenizer": "./nowhere"}, "no such directory"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(TextConfig(sources[0]), **fields).load()


def test_files_from_before_these_fields_are_read():
    old = {"source": "x", "max_length": None, "dropout": 0.1, "adapt": {"type": "lora", "rank": 4}, "in_step": None}
    assert configs.from_dict(TextConfig, old) == TextConfig("x", adapt=LoRA(4))
