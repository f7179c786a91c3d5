import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import sample
from jaxgen.errors import UserError
from jaxgen.nn.module import flatten, init_params
from jaxgen.text import scratch, weights
from jaxgen.text.expand import continued, expand_prompts, merged
from jaxgen.text.generate import load_language_model
from jaxgen.text.gpt2 import GPT2Config


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("a red dog", " A red dog on a lawn, evening\nShort: a", "A red dog on a lawn, evening"),
        ("a red dog", ' "a red dog asleep" ', "a red dog asleep"),
        ("a red dog", "a brown dog on a lawn", "a red dog, a brown dog on a lawn"),
        ("a red dog.", "sunlight", "a red dog, sunlight"),
        ("a red dog", "\n\n", "a red dog"),
        ("a red dog", "", "a red dog"),
        ("一只狗", "in the snow", "一只狗, in the snow"),
    ],
)
def test_an_answer_never_loses_what_was_asked(prompt, answer, expected):
    assert merged(prompt, answer) == expected


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("a red dog", "on a lawn\na cat", "a red dog on a lawn"),
        ("a red dog", " on a lawn ", "a red dog on a lawn"),
        ("a red dog", ", asleep", "a red dog, asleep"),
        ("a red dog ", "asleep", "a red dog asleep"),
        ("a red dog", "\nasleep", "a red dog"),
        ("a red dog", "", "a red dog"),
    ],
)
def test_what_follows_a_prompt_is_put_behind_it(prompt, answer, expected):
    assert continued(prompt, answer) == expected


@given(st.lists(st.sampled_from(["red", "dog", "two", "cats", "on", "by"]), min_size=1).map(" ".join), st.text(max_size=40))
def test_every_word_survives_whatever_a_model_says(prompt, answer):
    words = merged(prompt, answer).casefold()
    assert all(word in words for word in prompt.split())


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A whole language model that knows the scenes' words and says anything."""
    place = tmp_path_factory.mktemp("lm")
    sentences = ["a small red circle", "Short: Long: wishes for a picture, and the same in one longer sentence."]
    scratch.make_tokenizer(sentences, 400).save(str(place / "tokenizer.json"))
    values = {"model_type": "gpt2", "vocab_size": 400, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256}
    config = GPT2Config.from_hf(values, "", "lm")
    flat = {name: np.asarray(leaf) for name, leaf in flatten(init_params(config.build, jax.random.key(0)))}
    save_file(weights.stored(flat, config.tensors()), place / "model.safetensors")
    (place / "config.json").write_text(json.dumps(values))
    return place


def test_prompts_are_expanded_one_by_one(directory):
    model = load_language_model(str(directory))
    both = expand_prompts(["a small red circle", "a circle"], model, max_new_tokens=8, seed=3)
    assert both == expand_prompts(["a small red circle", "a circle"], str(directory), max_new_tokens=8, seed=3)
    assert both[0].startswith("a small red circle, ")
    assert both[:1] == expand_prompts(["a small red circle"], model, max_new_tokens=8, seed=3)
    assert both != expand_prompts(["a small red circle", "a circle"], model, max_new_tokens=8, seed=4)
    with pytest.raises(UserError, match="positions of this model"):
        expand_prompts(["a circle"], model, max_new_tokens=500)
    with pytest.raises(UserError, match="once, where the prompt goes"):
        expand_prompts(["a circle"], model, template="Long:")


def test_a_models_own_template_is_used(directory, tmp_path):
    model = load_language_model(str(directory))
    model.templates = {"expand": "wishes: {}"}
    asked = []
    model.generate = lambda prompts, **_: asked.extend(prompts) or ["and a  cross"] * len(prompts)
    assert expand_prompts(["a small \n circle"], model) == ["a small \n circle and a  cross"]
    assert expand_prompts(["a circle"], model, template="Short: {}\nLong:") == ["a circle, and a  cross"]
    assert asked == ["wishes: a small circle", "Short: a circle\nLong:"]
    values = json.loads((directory / "config.json").read_text())
    for tasks, found in (
        ({"expand": {"template": "{}"}, "rewrite": {"template": "x {} y"}}, {"expand": "{}", "rewrite": "x {} y"}),
        ({"summarization": {"prefix": "sum: "}, "other": 3}, {}),  # what T5 and others have there
        (None, {}),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values | {"task_specific_params": tasks}))
        for name in ("tokenizer.json", "model.safetensors"):
            (tmp_path / name).write_bytes((directory / name).read_bytes())
        assert load_language_model(str(tmp_path)).templates == found


def test_sample_draws_what_it_was_expanded_to(directory, tmp_path, monkeypatch, capsys):
    from PIL import Image

    out = tmp_path / "one.png"
    words = ["--prompt=a small red circle", f"--expand={directory}", "--num_images=1", "--steps=1", f"--out={out}"]
    monkeypatch.setattr("sys.argv", ["sample.py", *words])
    sample.main()
    told = capsys.readouterr().out.splitlines()
    stored = Image.open(out).text
    assert json.loads(stored["asked"]) == ["a small red circle"]
    assert json.loads(stored["prompts"]) == [told[0]]
    assert told[0].startswith("a small red circle, ")
