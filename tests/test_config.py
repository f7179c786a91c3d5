import dataclasses

import pytest

from jaxgen import config
from jaxgen.errors import UserError
from jaxgen.train.config import RunConfig

QUICK = "configs/quickstart.py"


def test_overrides_are_typed_by_their_field():
    c = config.load(
        QUICK,
        [
            "train.steps=5",
            "optimizer.learning_rate=1e-4",
            "sample.prompts=a red ring,a blue cross",
            "family.network=transformer",
            "family.network.patch=8",
            "text.in_step=true",
            "data.flip=none",
        ],
    )
    assert c.train.steps == 5
    assert c.optimizer.learning_rate == 1e-4
    assert c.sample.prompts == ("a red ring", "a blue cross")
    assert type(c.family.network).__name__ == "Transformer"
    assert c.family.network.patch == 8
    assert c.text.in_step is True
    assert c.data.flip is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=5", "did you mean train.steps"),
        ("trian.steps=5", "did you mean train"),
        ("train.steps=five", "not a whole number"),
        ("train.steps=1.5", "not a whole number"),
        ("text.in_step=maybe", "true or false"),
        ("optimizer.name=sgd", "adamw"),
        ("train.steps.more=1", "no field"),
        ("train.steps", "give a value"),
        ("train.steps=0", "at least 1"),
        ("train.ema_decay=1.5", "must lie in"),
        ("train.accumulate=3", "no multiple"),
        ("mesh.data=0", "positive"),
        ("data.image_size=4", "at least 8"),
        ("data.caption_template=a photo", "{label}"),
        ("text.dropout=1", "must lie"),
        ("family.time_uniform=2", "share"),
        ("optimizer.learning_rate=0", "positive"),
    ],
)
def test_mistakes_are_one_clear_line(override, message):
    with pytest.raises(UserError) as caught:
        config.load(QUICK, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        config.load("configs/nothing.py")
    for text, message in (("x = 1", "get_config"), ("1 / 0", "ZeroDivisionError"), ("def broken(", "SyntaxError")):
        file = tmp_path / "c.py"
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            config.load(str(file))


@pytest.mark.parametrize("name", ["quickstart", "scenes", "scenes_zh", "emoji", "flickr8k", "coco_dit_xl_tpu"])
def test_every_configuration_survives_json(name):
    c = config.load(f"configs/{name}.py")
    assert config.from_dict(RunConfig, config.to_dict(c)) == c


def test_differences_name_the_field():
    c = config.load(QUICK)
    other = dataclasses.replace(c, train=dataclasses.replace(c.train, steps=7))
    assert list(config.differences(config.to_dict(c), config.to_dict(other))) == [("train.steps", c.train.steps, 7)]


def test_unknown_fields_and_types_in_a_stored_configuration_are_refused():
    values = config.to_dict(config.load(QUICK))
    with pytest.raises(UserError, match="did you mean steps"):
        config.from_dict(RunConfig, {**values, "train": {"step": 3}})
    with pytest.raises(UserError, match="unknown type 'gann'"):
        config.from_dict(RunConfig, {**values, "family": {"type": "gann"}})


def test_arguments_are_split():
    path, overrides, rest = config.split_arguments(
        ["--config", "a.py", "--config.train.steps=3", "--workdir=w", "--config.seed", "4"]
    )
    assert (path, overrides, rest) == ("a.py", ["train.steps=3", "seed=4"], ["--workdir=w"])
