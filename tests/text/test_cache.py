import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.storage import as_path
from jaxgen.text import cache, load_text_encoder, scratch
from jaxgen.text.cache import check_size, encode_captions
from jaxgen.text.encoder import TextEncoder
from jaxgen.text.features import TextFeatures
from jaxgen.text.pair import PairedTextEncoder

CAPTIONS = ["a small red circle", "two dogs", "a large blue square to the left of a small green ring", "words " * 30]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("scratch") / "encoder"
    scratch.write(directory, [*CAPTIONS, "a picture of please"], hidden_size=16, layers=1, vocab=150, max_length=64)
    return str(directory)


@pytest.fixture(scope="module")
def encoder(source):
    return load_text_encoder(source)


def agree(table, encoder, captions):
    for caption in captions:
        text, alone = table.lookup([caption]), encoder([caption])
        n = int(np.asarray(alone.mask).sum())
        assert text.mask.sum() == n
        np.testing.assert_allclose(text.hidden[0, :n], np.asarray(alone.hidden)[0, :n], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(text.pooled, alone.pooled, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "template", "pair"])
def test_rows_are_what_the_encoder_gives(source, encoder, kind):
    if kind == "template":
        encoder = load_text_encoder(source, template="a picture of {} please")
    if kind == "pair":
        encoder = PairedTextEncoder(encoder, load_text_encoder(source, layers=0), "tokens")
    agree(encode_captions(encoder, CAPTIONS), encoder, [*CAPTIONS, ""])


def test_what_is_there_is_taken_and_only_the_rest_encoded(source, encoder, tmp_path, monkeypatch):
    encoded = []
    real = cache._encode
    monkeypatch.setattr(
        cache, "_encode", lambda e, captions, tokens: encoded.append(list(captions)) or real(e, captions, tokens)
    )
    path = as_path(tmp_path)
    first = encode_captions(encoder, CAPTIONS[:2], path)
    again = encode_captions(encoder, CAPTIONS[:2], path)
    np.testing.assert_array_equal(first.hidden, again.hidden)
    more = encode_captions(encoder, CAPTIONS, path)
    assert encoded == [sorted(["", *CAPTIONS[:2]]), sorted(CAPTIONS[2:])]
    agree(more, encoder, [*CAPTIONS, ""])
    np.testing.assert_array_equal(more.lookup(["two dogs"]).hidden[:, :4], first.lookup(["two dogs"]).hidden[:, :4])
    other = load_text_encoder(source, layers=0)  # another fingerprint: nothing of it is used
    agree(encode_captions(other, CAPTIONS, path), other, CAPTIONS)
    assert len(encoded[-1]) == 5
    (path / "hidden.npy").write_bytes((path / "hidden.npy").read_bytes()[:-100])
    agree(encode_captions(other, CAPTIONS, path), other, CAPTIONS)
    assert len(encoded) == 4


def test_a_hopeless_table_is_refused_before_anything_is_encoded():
    with pytest.raises(UserError, match=r"10,000,000 captions x 77 tokens x 4096 features would take 6\.3 TB.*in_step=True"):
        check_size(10_000_000, 77, 4096, 512 * 10**9)
    check_size(50_000, 20, 384, 8 * 10**9)


def test_states_beyond_half_precision_are_kept(encoder):
    """Some language models' states reach tens of thousands."""

    def apply(params, ids, mask):
        text = encoder.apply(params, ids, mask)
        return TextFeatures(text.hidden * 1e6, text.pooled, text.mask)

    large = TextEncoder(
        encoder.params, apply, encoder.tokenizer, hidden_size=16, pooled_size=16, max_length=64, fingerprint="large"
    )
    table = encode_captions(large, CAPTIONS)
    text = large(["two dogs"])
    np.testing.assert_allclose(table.lookup(["two dogs"]).hidden[0, :4], np.asarray(text.hidden)[0, :4], rtol=1e-4, atol=10)
