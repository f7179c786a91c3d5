from pathlib import Path

import numpy as np
import pytest

from jaxgen.text import load_text_encoder

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
STORED = np.load(Path(__file__).parent / "references" / "minilm.npz")
SENTENCES = [str(s) for s in STORED["sentences"]]


@pytest.fixture(scope="module")
def encoder():
    return load_text_encoder(MINILM, layers=(0, 1, 2, 3, 4, 5, 6))


def test_there_are_enough_references():
    assert len(SENTENCES) >= 20


@pytest.mark.parametrize("i", range(len(SENTENCES)))
def test_every_layer_is_that_of_transformers(encoder, i):
    """Sentences one by one and padded: token ids equal, every layer within 1e-5 of the largest value there."""
    tokens = encoder.tokenize([SENTENCES[i]])
    ids, count = STORED[f"ids_{i}"], len(STORED[f"ids_{i}"])
    np.testing.assert_array_equal(tokens["input_ids"][0, :count], ids)
    assert tokens["attention_mask"].sum() == count
    text = encoder(tokens["input_ids"], tokens["attention_mask"])
    hidden = np.asarray(text.hidden)[0, :count].reshape(count, 7, 384).transpose(1, 0, 2)[:, :, ::24]
    error = np.abs(hidden - STORED[f"hidden_{i}"]).max((1, 2)) / STORED[f"largest_{i}"]
    assert error.max() <= 1e-5
    np.testing.assert_allclose(text.pooled[0], STORED[f"pooled_{i}"], atol=1e-5 * np.abs(STORED[f"pooled_{i}"]).max())


def test_batch_mates_and_padding_do_not_matter(encoder):
    together, alone = encoder(SENTENCES[3:8]), encoder(SENTENCES[4])
    t = int(np.asarray(alone.mask).sum())
    np.testing.assert_allclose(together.hidden[1, :t], alone.hidden[0, :t], atol=2e-5)
    np.testing.assert_allclose(together.pooled[1], alone.pooled[0], atol=1e-6)
    assert together.hidden.dtype == np.float32
    assert together.mask.dtype == bool


def test_pairs_of_sentences_are_as_alike_as_pytorch_finds_them():
    encoder, pairs, vectors = load_text_encoder(MINILM), STORED["pairs"], STORED["vectors"]
    ours = np.asarray(encoder([str(s) for s in pairs.ravel()]).pooled).reshape(vectors.shape)
    np.testing.assert_allclose(ours, vectors, atol=1e-5 * np.abs(vectors).max())
    alike, theirs = (np.sum(v[:, 0] * v[:, 1], axis=-1) for v in (ours, vectors))
    assert len(pairs) >= 30
    assert np.diff(np.sort(theirs)).min() > 5e-5  # far more than what two libraries differ by
    np.testing.assert_array_equal(np.argsort(alike), np.argsort(theirs))
