"""Captions in other words: written once, kept, drawn beside the captions themselves, and never where pictures are judged."""

import json
import shutil
from itertools import islice

import cv2
import numpy as np
import pytest

from jaxgen import config as configs
from jaxgen.data import rewrite
from jaxgen.data.config import DataConfig, RewriteConfig
from jaxgen.data.pipeline import Source, batches, load_source
from jaxgen.data.rewrite import Rewritings, rewritings
from jaxgen.errors import UserError
from jaxgen.text import scratch
from jaxgen.text.generate import LanguageModel, load_language_model
from tests.train.test_start import begin, refused, site

CAPTIONS = ["a red circle", "two blue rings", "a red circle above a cross"]
SETTINGS = {"template": "again: {} =", "max_new_tokens": 48, "temperature": 1.0, "top_p": 1.0, "variants": 3}


def write(directory, seed=0, **values):
    """A language model that says anything in the captions' words, with more fields in its config.json."""
    shutil.rmtree(directory, ignore_errors=True)
    scratch.write(directory, [*CAPTIONS, "again: ="], hidden_size=8, layers=1, heads=1, max_length=256, seed=seed, causal=True)
    said = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(said | values))
    return str(directory)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write(tmp_path_factory.mktemp("models") / "model")


def config(tmp_path, source, **settings):
    return DataConfig(dir=str(tmp_path), rewrite=RewriteConfig(source=source, **SETTINGS | settings))


def files(tmp_path):
    return sorted((tmp_path / "rewritten" / "scenes").iterdir())


@pytest.fixture
def asked(monkeypatch):
    """The prompts, with their seeds, that any language model is asked."""
    found = []
    plain = LanguageModel.generate

    def generate(self, prompts, *rest, **settings):
        found.extend(zip(map(tuple, prompts), settings["seed"], strict=True))
        return plain(self, prompts, *rest, **settings)

    monkeypatch.setattr(LanguageModel, "generate", generate)
    return found


def test_captions_are_rewritten_once_and_alike(tmp_path, source, asked):
    first = rewritings(config(tmp_path / "a", source), CAPTIONS)
    prompts = {prompt for prompt, _ in asked}
    words = load_language_model(source).tokenizer
    assert prompts == {tuple(row) for row in words.encode([f"again: {caption} =" for caption in CAPTIONS], 99)}
    assert set(first.variants) == set(CAPTIONS)
    assert all(1 <= len(found) <= 3 for found in first.variants.values())
    assert any(found != [caption] for caption, found in first.variants.items())
    asked.clear()
    again = rewritings(config(tmp_path / "a", source, share=0.25), CAPTIONS)
    assert not asked
    assert (again.variants, again.key, again.share) == (first.variants, first.key, 0.25)
    assert rewritings(config(tmp_path / "b", source), CAPTIONS[::-1] * 2).variants == first.variants
    # A set that grew: what it had stays, and only what is new is asked.
    asked.clear()
    more = rewritings(config(tmp_path / "a", source), [*CAPTIONS, "a cross"])
    assert {prompt for prompt, _ in asked} == {tuple(words.encode(["again: a cross ="], 99)[0])}
    assert {caption: more.variants[caption] for caption in CAPTIONS} == first.variants
    assert rewritings(config(tmp_path / "c", source), ["a cross", CAPTIONS[1]]).variants["a cross"] == more.variants["a cross"]
    assert rewritings(config(tmp_path / "a", source), CAPTIONS[:1]).variants.keys() == {CAPTIONS[0]}
    assert len(files(tmp_path / "a")) == 1
    files(tmp_path / "a")[0].write_text("{")  # broken: made again
    assert rewritings(config(tmp_path / "a", source), CAPTIONS).variants == first.variants


def test_another_model_template_or_seed_is_asked_anew(tmp_path, source):
    first = rewritings(config(tmp_path, source), CAPTIONS)
    other = write(tmp_path / "model", seed=1)
    for changed in (config(tmp_path, other), config(tmp_path, source, seed=1), config(tmp_path, source, template="{} =")):
        found = rewritings(changed, CAPTIONS)
        assert found.key != first.key
        assert found.variants != first.variants
    assert len(files(tmp_path)) == 4
    # The same files in another place are the same model.
    assert rewritings(config(tmp_path, write(tmp_path / "copy")), CAPTIONS).key == first.key


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ([], "a red circle"),
        (["[UNK]"] * 48, "a red circle"),
        (["red", "rings"], "red rings"),
        (["red"] * 48, "a red circle"),  # it did not end
        (["red"] * 7, " ".join(["red"] * 7)),
    ],
)
def test_an_answer_that_says_nothing_or_has_no_end_leaves_the_caption(tmp_path, source, monkeypatch, answer, expected):
    words = load_language_model(source).tokenizer
    ids = [words._fast.token_to_id(word) for word in answer]
    ids = [1 if i is None else i for i in ids]
    monkeypatch.setattr(LanguageModel, "generate", lambda self, prompts, **_: [ids] * len(prompts))
    assert rewritings(config(tmp_path, source), CAPTIONS[:1]).variants == {"a red circle": [expected]}


def test_a_models_own_template_comes_before_the_examples(tmp_path, source):
    model = load_language_model(source)
    assert rewrite._template(RewriteConfig(source=source), model) == rewrite.TEMPLATE
    assert rewrite._template(RewriteConfig(source=source, template="{} ="), model) == "{} ="
    model.templates = {"expand": "{}", "rewrite": "again: {} ="}
    assert rewrite._template(RewriteConfig(source=source), model) == "again: {} ="
    taught = write(tmp_path / "taught", task_specific_params={"expand": {"template": "{}"}})
    with pytest.raises(UserError, match="was trained to write captions and not to reword them") as caught:
        rewritings(config(tmp_path, taught, template=""), CAPTIONS)
    assert "\n" not in str(caught.value)


def test_an_answer_ends_with_its_line(tmp_path):
    from tokenizers import Tokenizer, decoders, models

    directory = tmp_path / "model"
    model = load_language_model(write(directory))
    assert model.line_ends == model.ends == (3,)  # this vocabulary has no such token
    letters = Tokenizer(models.WordLevel({"a": 0, "\n": 1, "b": 2, "[UNK]": 3}, unk_token="[UNK]"))
    from tokenizers import Regex, pre_tokenizers

    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.decoder = decoders.Fuse()
    letters.save(str(directory / "tokenizer.json"))
    model = load_language_model(str(directory))
    assert model.line_ends == (3, 1)


class Records:
    """Twenty pictures with two captions each."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        image = np.full((8, 8, 3), index * 10, np.uint8)
        return cv2.imencode(".png", image)[1].tobytes(), [f"{index} one", f"{index} two"], ""

    def captions(self):
        return [self[index][1] for index in range(len(self))]


def told(share, keep_in_memory=512, **settings):
    """Captions of some batches, half of them dropped, with variants drawn at this share."""
    source = Source(DataConfig(image_size=8, keep_in_memory=keep_in_memory), Records())
    if share:
        source.rewritings = Rewritings({c: [f"{c} A", f"{c} B"] for c in source.captions()}, share, "key")
    feed = batches(source, seed=3, batch_size=8, **settings)
    return [batch["caption"] for batch in islice(feed, 25)], source


def test_a_share_of_what_is_seen_is_reworded_and_nothing_else_moves():
    plain, _ = told(0.0, caption_dropout=0.25)
    mixed, source = told(0.3, caption_dropout=0.25)
    pairs = [(a, b) for some, others in zip(plain, mixed, strict=True) for a, b in zip(some, others, strict=True)]
    assert all(b == a or (a and b in (f"{a} A", f"{a} B")) for a, b in pairs)  # one that is dropped stays so
    seen = [(a, b) for a, b in pairs if a]
    share = np.mean([a != b for a, b in seen])
    assert abs(share - 0.3) < 0.1
    assert 0.3 < np.mean([b.endswith("A") for a, b in seen if a != b]) < 0.7
    assert all(
        b != a for some, others in zip(told(0.0)[0], told(1.0)[0], strict=True) for a, b in zip(some, others, strict=True)
    )
    known = set(source.captions())
    assert {b for _, b in seen} <= known  # so that a table of captions has them all
    assert len(known) == 20 * 2 * 3


def test_what_a_step_sees_is_a_function_of_seed_and_step():
    whole, _ = told(0.5)
    assert told(0.5, start_step=5)[0][:20] == whole[5:]
    assert told(0.5, keep_in_memory=0, threads=3)[0] == whole
    parts = [told(0.5, process_index=i, process_count=2)[0] for i in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


def test_only_training_captions_of_a_set_are_rewritten(tmp_path, source):
    plain = DataConfig(image_size=16, train_examples=8, dir=str(tmp_path))
    asked = DataConfig(
        image_size=16, train_examples=8, dir=str(tmp_path), rewrite=RewriteConfig(source=source, variants=1, **TEXT_ONLY)
    )
    mixed = load_source(asked)
    own = set(load_source(plain).captions())
    assert set(mixed.rewritings.variants) == own < set(mixed.captions())
    for split in ("validation", "test", "test_unseen_pairs", "test_paraphrases"):
        assert load_source(asked, split).rewritings is None
    assert load_source(plain).rewritings is None


TEXT_ONLY = {"template": "again: {} =", "max_new_tokens": 6, "temperature": 1.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "/nowhere"}, r"data\.rewrite: data\.rewrite\.source=/nowhere: no such directory"),
        ({"max_new_tokens": 256}, r"data\.rewrite: .* positions of this model"),
        ({"template": "again " * 300 + "{}"}, r"data\.rewrite: .* positions of this model"),
    ],
)
def test_models_that_cannot_are_told(tmp_path, source, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        rewritings(config(tmp_path, **{"source": source, **settings}), CAPTIONS)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "rewritten").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("share=0", "must lie in (0, 1]"),
        ("share=1.5", "must lie in (0, 1]"),
        ("variants=0", "at least 1"),
        ("max_new_tokens=1", "at least 2"),
        ("temperature=-1", "at least 0"),
        ("top_p=0", "lie in (0, 1]"),
        ("template=again", "needs {} once"),
    ],
)
def test_mistakes_are_one_clear_line(override, message):
    with pytest.raises(UserError) as caught:
        configs.load("configs/quickstart.py", [f"data.rewrite.{override}"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_goes_on_with_the_captions_it_was_begun_with(tmp_path):
    with site(tmp_path) as place:
        model = write(tmp_path / "model")
        more = [f"--config.data.rewrite.{name}={value}" for name, value in (*TEXT_ONLY.items(), ("source", model))]
        more += ["--config.train.steps=2", "--config.train.checkpoint_every=2", "--config.optimizer.schedule=constant"]
        status, _, err = begin(place, "run", *more)
        assert status == 0, err
        (kept,) = (tmp_path / "data" / "rewritten").glob("folder*/*.json")
        assert set(json.loads(kept.read_text())["captions"]) == {f"grey number {k}" for k in range(5)}
        table = set()
        for file in (tmp_path / "data" / "captions").rglob("*.npy"):
            table |= set(json.loads(np.load(file.open("rb")).tobytes()))
        assert {v for some in json.loads(kept.read_text())["captions"].values() for v in some} <= table
        write(tmp_path / "model", seed=1)
        more += ["--config.train.steps=3"]
        assert "captions that another language model rewrote (data.rewrite)" in refused(place, "run", *more)
        write(tmp_path / "model")
        assert begin(place, "run", *more)[0] == 0
