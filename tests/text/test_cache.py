from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.storage import as_path
from jaxgen.text import cache, load_text_encoder, scratch
from jaxgen.text.cache import CaptionTable, check_size
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
    agree(CaptionTable(encoder, CAPTIONS), encoder, [*CAPTIONS, ""])


def whole(encoder, captions, path=None):
    """A table of which everything has been asked for."""
    table = CaptionTable(encoder, captions, path)
    table.lookup(captions)
    return table


@pytest.fixture
def encoded(monkeypatch):
    """What was encoded, call by call."""
    calls = []
    real = cache._over_local_devices

    def counted(encoder):
        encode, batch = real(encoder)
        return lambda captions, length: calls.append(list(captions)) or encode(captions, length), batch

    monkeypatch.setattr(cache, "_over_local_devices", counted)
    return calls


def test_what_is_there_is_taken_and_only_the_rest_encoded(source, encoder, tmp_path, encoded):
    path = as_path(tmp_path)
    first = whole(encoder, CAPTIONS[:2], path).lookup(CAPTIONS[:2])
    again = whole(encoder, CAPTIONS[:2], path).lookup(CAPTIONS[:2])
    np.testing.assert_array_equal(first.hidden, again.hidden)
    more = whole(encoder, CAPTIONS, path)
    assert [sorted(some) for some in encoded] == [sorted(["", *CAPTIONS[:2]]), sorted(CAPTIONS[2:])]
    agree(more, encoder, [*CAPTIONS, ""])
    np.testing.assert_array_equal(more.lookup(["two dogs"]).hidden[0, :4], first.hidden[1, :4])
    fewer = CaptionTable(encoder, CAPTIONS[:1], path)  # leaves what is there
    agree(fewer, encoder, CAPTIONS[:1])
    other = load_text_encoder(source, layers=0)  # another fingerprint: nothing of it is used
    agree(CaptionTable(other, CAPTIONS, path), other, CAPTIONS)
    assert len(encoded) == 3
    assert len(encoded[-1]) == 5
    agree(CaptionTable(encoder, CAPTIONS, path), encoder, CAPTIONS)  # and nothing of it is lost
    assert len(encoded) == 3
    (file,) = (path / other.fingerprint[:16]).glob("*")
    file.write_bytes(file.read_bytes()[:-100])
    agree(CaptionTable(other, CAPTIONS, path), other, CAPTIONS)
    assert len(encoded) == 4


def test_runs_at_the_same_time_lose_nothing_of_each_other(encoder, tmp_path, encoded):
    path = as_path(tmp_path)
    one, two = CaptionTable(encoder, CAPTIONS[:2], path), CaptionTable(encoder, CAPTIONS[1:], path)
    texts = [table.lookup(["two dogs"]) for table in (one, two)]
    assert texts[0].hidden.shape[1] < texts[1].hidden.shape[1] == 32  # each is as long as its own captions ask for
    one.lookup(CAPTIONS[:2])
    two.lookup(CAPTIONS[1:])
    count = len(encoded)
    agree(CaptionTable(encoder, CAPTIONS, path), encoder, [*CAPTIONS, ""])
    agree(CaptionTable(encoder, CAPTIONS[:2], path), encoder, CAPTIONS[:2])
    assert len(encoded) == count


def test_only_what_is_asked_for_is_encoded_with_its_like(encoder, tmp_path, encoded, monkeypatch):
    monkeypatch.setattr(cache, "GROUP", 1)  # of captions, on each device
    path, size = as_path(tmp_path), len(jax.devices())
    captions = [" ".join(["red"] * (1 + i // size)) + f" {'abcdefgh'[i % size]}" for i in range(3 * size)]
    table = CaptionTable(encoder, captions, path)
    assert not encoded
    late = table.lookup(captions[size : size + 2])
    assert len(encoded) == 1
    assert not list(path.glob("*/*.npy"))
    table.lookup(captions[size : 2 * size])
    other = CaptionTable(encoder, captions, path)
    np.testing.assert_array_equal(other.lookup([*captions, ""]).hidden[size : size + 2], late.hidden)  # whatever came before
    assert list(path.glob("*/*.npy"))
    count = len(encoded)
    np.testing.assert_array_equal(CaptionTable(encoder, captions, path).lookup(captions).hidden, other.lookup(captions).hidden)
    assert len(encoded) == count


def test_what_was_encoded_before_a_kill_is_kept_and_the_rest_the_same(encoder, tmp_path, encoded, monkeypatch):
    """Groups of three lengths, the longest of which is cut short; a run that goes on must see the bits it would have seen."""
    monkeypatch.setattr(cache, "GROUP", 1)
    size = len(jax.devices())
    captions = [" ".join(["red"] * (1 + 3 * (i // size))) + f" {'abcdefgh'[i % size]}" for i in range(3 * size)]
    wanted = whole(encoder, captions).lookup(captions)
    for first in range(3):
        path = as_path(tmp_path / str(first))
        monkeypatch.setattr(cache, "KEEP_EVERY", 0.0)
        CaptionTable(encoder, captions, path).lookup(captions[first * size : (first + 1) * size])
        monkeypatch.setattr(cache, "KEEP_EVERY", 1e9)
        del encoded[:]
        again = CaptionTable(encoder, captions, path)
        np.testing.assert_array_equal(again.lookup(captions).hidden, wanted.hidden)
        again.lookup([""])
        assert len(encoded) == 3  # with the empty caption's, which is alone
        assert len(CaptionTable(encoder, captions, path)._groups) == 0


def test_several_threads_encode_nothing_twice(encoder, encoded):
    captions = [f"{'red ' * (i % 7)}{'abcdefghij'[i % 10]} {'klmnopqrst'[i // 10]}" for i in range(100)]
    table = CaptionTable(encoder, captions)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: table.lookup(captions[i::4]), range(4)))
    once = [caption for some in encoded for caption in some]
    assert sorted(once) == sorted({*captions, ""})
    for i, text in enumerate(results):
        np.testing.assert_array_equal(text.hidden, table.lookup(captions[i::4]).hidden)


def test_a_full_disk_costs_the_cache_alone(encoder, tmp_path, monkeypatch, capsys):
    def full(path, *values):
        raise UserError("the disk is full")

    monkeypatch.setattr(cache, "write_arrays", full)
    agree(CaptionTable(encoder, CAPTIONS, as_path(tmp_path)), encoder, [*CAPTIONS, ""])
    assert "warning: encoded captions are not kept: the disk is full" in capsys.readouterr().err


def test_a_hopeless_table_is_refused_before_anything_is_encoded():
    with pytest.raises(UserError, match=r"10,000,000 captions x 77 tokens x 4096 features would take 6\.3 TB.*in_step=True"):
        check_size(10_000_000, 77, 4096, 512 * 10**9)
    check_size(50_000, 20, 384, 8 * 10**9)


def test_states_beyond_half_precision_are_kept(encoder, tmp_path, monkeypatch):
    """Some language models' states reach tens of thousands."""

    def apply(params, ids, mask):
        text = encoder.apply(params, ids, mask)
        return TextFeatures(text.hidden * 1e6, text.pooled, text.mask)

    large = TextEncoder(
        encoder.params, apply, encoder.tokenizer, hidden_size=16, pooled_size=16, max_length=64, fingerprint="large"
    )
    table = CaptionTable(large, CAPTIONS)
    text = large(["two dogs"])
    np.testing.assert_allclose(table.lookup(["two dogs"]).hidden[0, :4], np.asarray(text.hidden)[0, :4], rtol=1e-4, atol=10)
    # A table once float32 stays so: the small states that came after the large ones are not rounded where a run goes on.
    monkeypatch.setattr(cache, "GROUP", 1)
    monkeypatch.setattr(cache, "KEEP_EVERY", 0.0)

    def graded(params, ids, mask):
        text = encoder.apply(params, ids, mask)
        return TextFeatures(text.hidden * jax.numpy.where(mask.sum(1) > 20, 1e6, 1.0)[:, None, None], text.pooled, text.mask)

    mixed = TextEncoder(
        encoder.params, graded, encoder.tokenizer, hidden_size=16, pooled_size=16, max_length=64, fingerprint="mixed"
    )
    captions = ["words " * 30 + letter for letter in "abcdefgh"] + [f"two dogs {letter}" for letter in "abcdefgh"]
    first = CaptionTable(mixed, captions, as_path(tmp_path))
    seen = [first.lookup([caption]).hidden for caption in captions][-1]
    assert np.abs(seen).max() < 100
    monkeypatch.setattr(cache, "_over_local_devices", lambda encoder: (None, 1))  # nothing is encoded again
    few = CaptionTable(mixed, captions[8:], as_path(tmp_path))
    np.testing.assert_array_equal(few.lookup(captions[-1:]).hidden, seen[:, : few.lookup(captions[-1:]).hidden.shape[1]])
