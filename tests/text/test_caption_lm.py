"""A language model of captions: its loss, whole runs through train.py, and what they leave."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import jaxgen
import train
from jaxgen import config as configs
from jaxgen.errors import UserError
from jaxgen.nn.module import flatten
from jaxgen.parallel import runtime
from jaxgen.storage import as_path
from jaxgen.text import scratch
from jaxgen.text.adapt import Full, LoRA, select, with_text
from jaxgen.text.encoder import pad
from jaxgen.text.expand import expand_prompts
from jaxgen.text.generate import LanguageModel, load_language_model, save_language_model
from jaxgen.train import language
from jaxgen.train.checkpoints import Checkpoints
from jaxgen.train.language import NextToken, opening, split, tokenized, with_pairs
from tests.text.cases import Case
from tests.train.test_start import call, metrics, saved

CAPTIONS = ["red circle above a cross", "blue ring below a star", "green square", "two rings and one large cross"]
CONFIG = """
from jaxgen.data.config import DataConfig
from jaxgen.parallel.mesh import MeshConfig
from jaxgen.train.config import *
from jaxgen.train.language import *

def get_config():
    return LanguageRunConfig(
        data=DataConfig(name="text:{file}"),
        text=LanguageConfig(max_length=16, hidden_size=16, layers=1, heads=2, vocab=200),
        mesh=MeshConfig(1, 1, 1),
        train=TrainConfig(steps=8, batch_size=4, log_every=1, checkpoint_every=4, ema_decay=0.5),
        optimizer=OptimizerConfig(learning_rate=2e-2, schedule="constant", warmup_steps=0),
        sample=WritingConfig(prompts=(), every=8, count=2, max_new_tokens=6),
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("caption_lm")
    (place / "captions.txt").write_text("\n".join(CAPTIONS))
    (place / "tiny.py").write_text(CONFIG.format(file=place / "captions.txt"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "start", lambda allow_cpu: None)
        jax.config.update("jax_disable_most_optimizations", True)  # compiling is what takes long here
        yield place
        jax.config.update("jax_disable_most_optimizations", False)


def begin(place, name, *more):
    return call(train.main, f"--config={place / 'tiny.py'}", f"--workdir={place / name}", *more)


@pytest.fixture(scope="module")
def whole(place):
    """A run that has learned the four captions by heart."""
    status, told, err = begin(
        place, "whole", "--config.train.steps=60", "--config.train.checkpoint_every=60", "--config.sample.prompts=red"
    )
    assert status == 0, err
    assert "4 texts, from step 0 to 60" in told
    assert f"--expand={place}/whole/model" in told
    return place / "whole"


def numbers(workdir):
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in metrics(workdir) if "loss" in line}


def arrays(directory):
    with safe_open(directory / "model.safetensors", "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_the_loss_is_the_cross_entropy_of_every_token_but_the_first(name, tmp_path):
    """By the logits of transformers, where it gives no other head those of the table of words."""
    Case(name).write(tmp_path)
    model, stored = load_language_model(str(tmp_path)), Case(name).stored
    logits = stored["logits"] if "logits" in stored else stored["last"] @ arrays(tmp_path)["wte.weight"].T
    logits = logits.astype(np.float64)
    share = np.exp(logits - logits.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    terms = []
    for row, ids, mask in zip(share, stored["ids"], stored["mask"], strict=True):
        terms += [-np.log(row[at, ids[at + 1]]) for at in range(mask.sum() - 1)]
    assert len(terms) == 19
    family = NextToken(model.pretrained.architecture, Full())
    params = with_text({"model": {}}, model.params, "model")
    score = jax.jit(lambda batch: family.losses(params, {"text": {}}, batch, jax.random.key(0))["model"])
    batch = {"input_ids": stored["ids"], "attention_mask": stored["mask"]}
    loss, told = score(batch)
    assert float(loss) == pytest.approx(np.mean(terms), rel=1e-5)
    assert float(told["perplexity"]) == pytest.approx(np.exp(np.mean(terms)), rel=1e-4)
    # What is padded says nothing, whatever it holds; nor does a row that is nothing else.
    batch["input_ids"] = np.where(stored["mask"] > 0, stored["ids"], 60)
    assert float(score(batch)[0]) == pytest.approx(float(loss), rel=1e-6)
    batch["attention_mask"] = np.zeros_like(stored["mask"])
    assert float(score(batch)[0]) == 0.0


def test_only_what_is_adapted_has_a_gradient_and_lora_begins_as_the_model_itself(fresh):
    model = load_language_model(str(fresh))
    architecture, batch = model.pretrained.architecture, pad([[2, 9, 11, 3]], 4, 0)
    full = jax.jit(NextToken(architecture, Full()).total)(model.params, {"text": {}}, batch)[0]
    method = LoRA(rank=2)
    trained = method.init(jax.random.key(0), model.params, architecture)
    adapted = NextToken(architecture, method)
    score = jax.jit(jax.value_and_grad(lambda t: adapted.total(t, {"text": model.params}, batch)[0]))
    loss, grads = score(trained)
    assert float(loss) == pytest.approx(float(full), rel=1e-6)
    assert {name.split(".")[2] for name, _ in flatten(grads)} == {"q", "v"}
    assert all(np.abs(leaf).max() > 0 for name, leaf in flatten(grads) if name.endswith(".b"))


def test_captions_are_learned_by_heart(whole):
    lines = metrics(whole)
    last = [line for line in lines if "perplexity" in line][-1]
    assert last["perplexity"] == pytest.approx(np.exp(last["loss"]), rel=1e-5)
    assert last["loss"] < 0.5  # which of the four it is cannot be known: log 4 over some seven tokens
    assert last["texts_per_sec"] > 0
    model = load_language_model(str(whole / "model"))
    starts = [caption.split()[0] for caption in CAPTIONS]
    assert [
        f"{start} {rest}" for start, rest in zip(starts, model.generate(starts, max_new_tokens=12), strict=True)
    ] == CAPTIONS
    assert expand_prompts(starts, model, max_new_tokens=12, temperature=0.0) == CAPTIONS
    assert set(model.generate([""] * 4, max_new_tokens=12, temperature=0.5)) <= set(CAPTIONS)
    assert (whole / "samples" / "step_0000008.txt").exists()
    assert (whole / "samples" / "step_0000060.txt").read_text().splitlines() == [CAPTIONS[0]] * 2


def test_the_directory_is_transformers_and_reads_back_bit_for_bit(whole, tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    directory = whole / "model"
    assert AutoConfig.from_pretrained(directory).model_type == "gpt2"
    words = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    assert (words.bos_token, words.eos_token) == ("[CLS]", "[SEP]")
    stored = arrays(directory)
    assert all(name.startswith("transformer.") for name in stored)
    model = load_language_model(str(directory))
    assert words(CAPTIONS).input_ids == model.tokenizer.encode(CAPTIONS, 64)
    assert model.templates == {"expand": "{}"}
    save_language_model(model, tmp_path / "again")
    again = arrays(tmp_path / "again")
    assert stored.keys() == again.keys()
    for name in stored:
        np.testing.assert_array_equal(stored[name], again[name], err_msg=name)
    other = load_language_model(str(tmp_path / "again"))
    hot = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    assert other.generate(["", "red", "blue", "two"], **hot) == model.generate(["", "red", "blue", "two"], **hot)
    (tmp_path / "again" / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(UserError, match=r"is not the file that digest\.json was made for"):
        load_language_model(str(tmp_path / "again"))
    with pytest.raises(UserError, match="choose a new directory"):
        save_language_model(model, tmp_path / "again")


def test_its_workdir_is_no_picture_models(whole):
    with pytest.raises(UserError, match=r"is a language model's: give .*/whole/model to sample\.py --expand"):
        jaxgen.load(str(whole))


def test_a_head_of_its_own_is_stored_above_the_model_as_transformers_has_it(tmp_path):
    Case("llama3").write(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    (tmp_path / "tokenizer.json").write_text("{}")
    model = load_language_model(str(tmp_path))
    save_language_model(model, tmp_path / "copy")
    theirs, ours = arrays(tmp_path), arrays(tmp_path / "copy")
    assert {"lm_head.weight", "model.layers.0.self_attn.q_proj.weight"} <= ours.keys()
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert load_language_model(str(tmp_path / "copy")).ends == (2, 5)
    extra = dataclasses.replace(model.pretrained, params={**model.params, "more": {"w": jnp.zeros(2)}})
    with pytest.raises(UserError, match=r"more\.w has no place in a Hugging Face directory"):
        save_language_model(LanguageModel(extra), tmp_path / "more")


@pytest.fixture(scope="module")
def straight(place):
    assert begin(place, "straight")[0] == 0
    return place / "straight"


def test_a_stopped_run_goes_on_bit_for_bit(place, straight):
    assert begin(place, "halved", "--config.train.steps=4")[0] == 0
    first = arrays(place / "halved" / "model")
    status, told, err = begin(place, "halved")
    assert status == 0, err
    assert "from step 4 to 8" in told
    assert saved(place / "halved") == [4, 8]
    assert numbers(place / "halved") == numbers(straight)
    assert list(numbers(straight)) == list(range(1, 9))
    ours, theirs = arrays(place / "halved" / "model"), arrays(straight / "model")
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert any((first[name] != ours[name]).any() for name in ours)
    # It is the running average that is written.
    average = Checkpoints(as_path(straight), keep=None).restore_ema()[0]["model"]["text"]
    np.testing.assert_array_equal(theirs["transformer.wte.weight"], average["words"]["embedding"])
    # A finished run writes its model anew, and nothing else.
    (place / "halved" / "model" / "config.json").unlink()
    status, told, _ = begin(place, "halved")
    assert status == 0
    assert "is finished" in told
    assert load_language_model(str(place / "halved" / "model")).templates
    # Other texts are another run.
    (place / "other.txt").write_text("\n".join(CAPTIONS[::-1]))
    status, _, err = begin(place, "halved", "--config.train.steps=9", f"--config.data.name=text:{place}/other.txt")
    assert status == 2
    assert "holds a run of another configuration: data.name" in err
    text = (place / "captions.txt").read_text()
    (place / "captions.txt").write_text(text.replace("green", "white"))
    status, _, err = begin(place, "halved", "--config.train.steps=9")
    (place / "captions.txt").write_text(text)
    assert status == 2
    assert "was begun with other model files or other texts" in err


def test_a_mesh_changes_nothing(place, straight):
    mesh = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
    status, _, err = begin(place, "meshed", "--config.train.steps=3", *mesh)
    assert status == 0, err
    ours, theirs = numbers(place / "meshed"), numbers(straight)
    for step in ours:
        np.testing.assert_allclose(ours[step], theirs[step], rtol=2e-5)
    assert arrays(place / "meshed" / "model").keys() == arrays(straight / "model").keys()


def test_low_ranks_on_another_model_change_their_kernels_alone(place, whole):
    more = ["--config.text.adapt=lora", "--config.text.adapt.rank=2", f"--config.text.source={whole}/model"]
    status, told, err = begin(place, "lora", "--config.train.steps=2", "--config.eval.every=0", *more)
    assert status == 0, err
    ours, theirs = arrays(place / "lora" / "model"), arrays(whole / "model")
    assert "0.00 million parameters" in told
    changed = {name for name in ours if (ours[name] != theirs[name]).any()}
    assert changed == {"transformer.h.0.attn.c_attn.weight"}
    q, k, v = np.split(ours["transformer.h.0.attn.c_attn.weight"] - theirs["transformer.h.0.attn.c_attn.weight"], 3, axis=1)
    assert np.abs(q).max() > 0
    assert np.abs(v).max() > 0
    assert (k == 0).all()


def test_captions_of_pictures_and_pairs_of_them(tmp_path, place):
    import cv2

    (tmp_path / "pictures").mkdir()
    for i in range(40):
        cv2.imwrite(str(tmp_path / "pictures" / f"{i}.png"), np.full((16, 16, 3), 6 * i, np.uint8))
        (tmp_path / "pictures" / f"{i}.txt").write_text(f"shade {i % 4}\ngrey number {i % 4}\n")
    more = [f"--config.data.name=folder:{tmp_path}/pictures", f"--config.data.dir={tmp_path}/data", "--config.eval.every=2"]
    more += ["--config.text.template=again: {} =", "--config.sample.prompts=again: shade 1 =", "--config.sample.every=2"]
    status, told, err = begin(place, "pairs", "--config.train.steps=2", "--config.eval.count=8", *more)
    assert status == 0, err
    assert re.search(r"eval/loss \d", told)
    last = metrics(place / "pairs")[-1]
    assert last["eval/perplexity"] == pytest.approx(np.exp(last["eval/loss"]))
    assert (place / "pairs" / "samples" / "step_0000002.txt").read_text().startswith("again: shade 1 =")
    model = load_language_model(str(place / "pairs" / "model"))
    assert model.templates == {"expand": "{}", "rewrite": "again: {} ="}
    assert all(model.tokenizer.unknown_fraction(word) == 0 for word in ("again: =", "number"))
    assert with_pairs(["a", "b"], "again: {} =") == ["a", "b", "again: a = b", "again: b = a"]
    assert with_pairs(["a"], "again: {} =") == ["a"]
    assert with_pairs(["a", "a"], "again: {} =") == ["a", "a"]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fresh") / "model"
    scratch.write(directory, CAPTIONS, hidden_size=8, layers=1, heads=1, max_length=32, causal=True)
    return directory


def test_a_fresh_model_leaves_a_text_open(fresh, tmp_path):
    model = load_language_model(str(fresh))
    words = model.tokenizer
    assert model.ends == (words.end,) == (3,)
    assert words.encode([""], 8) == [[2]]
    assert words.encode(["red circle"], 8)[0][0] == 2
    assert words.encode(["red circle"], 8)[0][-1] != 3
    assert words.decode(words.encode(CAPTIONS[:1], 32)[0]) == CAPTIONS[0]
    scratch.write(tmp_path / "same", CAPTIONS, hidden_size=8, layers=1, heads=1, max_length=32, causal=True)
    for file in fresh.iterdir():
        assert (tmp_path / "same" / file.name).read_bytes() == file.read_bytes()


def test_texts_begin_and_end_and_long_ones_go_on(fresh):
    model = load_language_model(str(fresh))
    (short,), long = tokenized([["red circle"], [CAPTIONS[3]]], model, 5)
    assert short == [2, *model.tokenizer.encode(["red circle"], 8)[0][1:], 3]
    assert [token for piece in long for token in piece] == [*model.tokenizer.encode([CAPTIONS[3]], 64)[0], 3]
    assert [len(piece) for piece in long] == [5, 3]
    assert opening(model) == ""


def test_a_tokenizer_that_marks_no_beginning_is_given_one(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    Case("gpt2").write(tmp_path)
    size = json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    words = Tokenizer(WordLevel({**{f"w{i}": i for i in range(size - 1)}, "<|endoftext|>": size - 1}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    words.add_special_tokens(["<|endoftext|>"])
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": size - 1}))
    model = load_language_model(str(tmp_path))
    assert opening(model) == "<|endoftext|>"
    assert tokenized([["w5 w7"]], model, 8) == [[[size - 1, 5, 7, size - 1]]]
    assert language.described({}, opening(model), "again {} =")["task_specific_params"] == {
        "expand": {"template": "<|endoftext|>{}"},
        "rewrite": {"template": "<|endoftext|>again {} ="},
    }


def test_a_plain_text_is_split_at_blank_lines_or_line_by_line(tmp_path):
    def read(text):
        (tmp_path / "text.txt").write_text(text)
        return language.read_texts(configs.apply_overrides(language.DataConfig(), [f"name=text:{tmp_path}/text.txt"]), "train")

    assert read("one\ntwo\n") == [["one"], ["two"]]
    assert read("one\ngoes on\n\n \n\ntwo\n") == [["one\ngoes on"], ["two"]]
    with pytest.raises(UserError, match="is empty"):
        read(" \n\n")


def test_what_is_held_out_hangs_on_what_it_says():
    rows = [[[i, j, 7]] for i in range(20) for j in range(20)]
    train_rows, held = split(rows)
    assert sorted([*train_rows, *held]) == rows
    assert 5 < len(held) < 45
    assert split(rows[::-1] + rows)[1] == held[::-1] + held
    assert split([[[1, 2], [3, 4]]])[0] == [[[1, 2]], [[3, 4]]]


def test_what_is_frozen_is_not_in_the_state_twice(fresh):
    model = load_language_model(str(fresh))
    method = language.LastLayers(1)
    trained = method.init(jax.random.key(0), model.params, model.pretrained.architecture)
    rest = select(model.params, lambda name: name not in dict(flatten(trained)))
    assert {name.split(".")[0] for name, _ in flatten(rest)} == {"words", "positions", "norm"}
    batch, architecture = pad([[2, 9, 11, 3]], 4, 0), model.pretrained.architecture
    part = jax.jit(NextToken(architecture, method).total)(trained, {"text": rest}, batch)
    assert float(part[0]) == float(jax.jit(NextToken(architecture, Full()).total)(model.params, {"text": {}}, batch)[0])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.metric=eval/exact", "judged by eval/loss"),
        ("optimizer.name=muon", "trained with adamw"),
        ("train.init_from=runs/a", "the model to begin with is text.source"),
        ("data.rewrite.source=runs/a", "is for pictures"),
        ("text.template=again", "needs {} once"),
        ("text.template=again {}", "something behind it"),
        ("text.adapt=lora", "fresh weights are trained in full"),
        ("text.adapt=prefix", "not full or last_layers or lora"),
        ("text.heads=3", "does not divide among text.heads=3"),
        ("text.max_length=4", "at least 8"),
        ("text.vocab=20", "characters alone are"),
        ("text.source=/nowhere", "no such directory"),
        ("data.name=text:/nowhere.txt", "cannot be read"),
        ("data.name=texts", "unknown; known"),
        ("eval.every=2", "too short to hold out a part of it"),
        ("train.batch_size=3", "does not divide"),
    ],
)
def test_mistakes_end_with_one_line(place, override, message):
    mesh = ["--config.mesh.data=2"] if "batch" in override else []
    status, _, err = begin(place, "refused", f"--config.{override}", *mesh)
    assert status == 2
    (line,) = re.findall("^error: .*$", err, re.MULTILINE)
    assert err.endswith(f"{line}\n")
    assert message in line


def test_the_configuration_survives_json():
    c = configs.load("configs/caption_lm.py", ["text.adapt=full", "data.name=text:a.txt"])
    assert configs.from_dict(language.LanguageRunConfig, configs.to_dict(c)) == c
