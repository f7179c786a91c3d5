import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.text import load_text_classifier, registry
from jaxgen.text.sources import resolve
from tests.text.cases import REFERENCES, Case, write

MINILM = resolve("sentence-transformers/all-MiniLM-L6-v2")
TEXTS = ["a dog", ("a dog", "two cats on a roof"), ("is it raining?", "no"), "", ("a very long one " * 30, "and a short one")]


def directory_of(name, directory, **fields):
    """A case's model with MiniLM's tokenizer: its table of words has 30522 rows."""
    case = Case(name)
    shapes = {tensor: tuple(shape) for tensor, shape in json.loads(str(case.stored["tensors"])).items()}
    (words,) = (tensor for tensor in shapes if tensor.endswith("word_embeddings.weight"))
    config = json.loads(str(case.stored["config"])) | {"vocab_size": 30522} | fields
    write(directory, config, shapes | {words: (30522, shapes[words][1])})
    shutil.copy(MINILM / "tokenizer.json", directory)
    return str(directory)


@pytest.fixture
def directory(tmp_path):
    return directory_of("bert_classifier", tmp_path, id2label={"0": "no", "1": "perhaps", "2": "yes"})


def test_the_second_sentence_is_told_from_the_first_as_in_transformers(directory, tmp_path):
    case = Case("bert_classifier")
    case.write(tmp_path)  # its own weights, beside the tokenizer
    words = {"type": "WordLevel", "vocab": {"[PAD]": 0}, "unk_token": "[PAD]"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": words}))
    apply, params = load_text_classifier(str(tmp_path)).functional()
    stored = case.stored
    logits = jax.jit(apply)(params, stored["ids"], stored["mask"], stored["types"])
    np.testing.assert_allclose(logits, stored["typed_logits"], atol=1e-5 * np.abs(stored["typed_logits"]).max())
    assert np.abs(stored["typed_logits"] - stored["logits"]).max() > 0.1 * np.abs(stored["logits"]).max()


def test_sentences_and_pairs_are_split_as_in_transformers(directory):
    classifier, stored = load_text_classifier(directory), np.load(REFERENCES / "minilm.npz")
    tokens = classifier.tokenize([(str(a), str(b)) if b else str(a) for a, b in stored["split"]])
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        np.testing.assert_array_equal(tokens[name], stored[f"split_{name}"])
        assert tokens[name].dtype == np.int32
    assert classifier.tokenize(["a dog"])["input_ids"].shape == (1, 8)


@pytest.mark.parametrize("name", ["bert_classifier", "roberta_classifier", "distilbert_classifier"])
def test_what_stands_beside_a_text_changes_nothing(name, tmp_path):
    classifier = load_text_classifier(directory_of(name, tmp_path))
    together = classifier(TEXTS)
    assert together.shape == (len(TEXTS), 3)
    assert together.dtype == jnp.float32
    np.testing.assert_allclose(classifier([TEXTS[1]])[0], together[1], atol=1e-4)
    assert classifier.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert np.unique(np.round(np.asarray(together), 3), axis=0).shape == together.shape


def test_order_matters_and_labels_have_their_names(directory):
    classifier = load_text_classifier(directory)
    assert classifier.labels == ("no", "perhaps", "yes")
    there, back = classifier([("a dog", "a cat"), ("a cat", "a dog")])
    assert np.abs(there - back).max() > 1e-2
    np.testing.assert_array_equal(classifier("a dog"), classifier(["a dog"]))


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({"id2label": {"0": "no", "2": "perhaps", "3": "yes"}}, {}, "id2label does not name the labels 0 to 2"),
        ({"id2label": {"0": "no", "1": 1, "2": "yes"}}, {}, "id2label does not name the labels 0 to 2"),
        ({"id2label": ["a", "b", "c"]}, {}, "id2label does not name the labels 0 to 2"),
        ({"id2label": {"0": "no", "1": "yes"}}, {}, "classifier.weight has shape [3, 32] and config.json asks for [2, 32]"),
        ({"vocab_size": 100}, {}, "config.json asks for [100, 32]"),
        ({}, {"max_length": 33}, "takes from 2 to 32 tokens"),
    ],
)
def test_what_is_no_classifier_is_told(tmp_path, fields, arguments, message):
    with pytest.raises(UserError) as error:
        load_text_classifier(directory_of("bert_classifier", tmp_path, **fields), **arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_models_without_such_a_head_are_told(tmp_path):
    with pytest.raises(UserError, match="a BertModel has no classification head"):
        load_text_classifier(str(MINILM))
    for kind in {*registry.ARCHITECTURES} - {"bert", "roberta", "xlm-roberta", "distilbert"}:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(UserError, match="has no classification head"):
            load_text_classifier(str(tmp_path))
