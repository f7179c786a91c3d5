"""The data sets beside scenes, on tiny sources in the layouts that they are published in."""

import dataclasses
import json
import re
import shutil
import sys
from itertools import islice

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

import train
from jaxgen.data.builder import Records, prepare
from jaxgen.data.config import DataConfig
from jaxgen.data.pipeline import batches, load_source
from jaxgen.data.recipe import decode
from jaxgen.data.scenes import Scenes
from jaxgen.errors import UserError

SIZE = 16


def picture(value, size=SIZE, ending=".png"):
    """The bytes of a picture of one RGB or RGBA colour."""
    order = [2, 1, 0, 3][: len(value)]
    return cv2.imencode(ending, np.full((size, size, len(value)), np.array(value)[order], np.uint8))[1].tobytes()


def problems(place):
    return [json.loads(file.read_text()) for file in place.rglob("problems.json")]


def by_caption(source):
    """The first caption of every picture, with the picture."""
    return {captions[0]: image for image, captions in (source[i] for i in range(len(source)))}


def said(source, steps=60):
    """All captions that are drawn in a while."""
    return {caption for batch in islice(batches(source, seed=0, batch_size=8), steps) for caption in batch["caption"]}


def told(config, split="train"):
    """The one line of the error that loading ends with."""
    with pytest.raises(UserError) as caught:
        load_source(config, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Emoji ------------------------------------------------------------------------------------------------------------

# What each name's share of the hash gives; another would move pictures from test to training.
NAMES = {
    "train": ["anchor", "alembic", "OK hand", "OK hand: dark skin tone"],
    "validation": ["avocado", "kiss: dark skin tone", "kiss: woman, man"],
    "test": ["croissant", "ice"],
}


def emoji(directory, entries):
    """The layout of the set: a folder a style, pictures and captions.jsonl in it. An entry's picture None is missing."""
    for style in ("noto_emoji", "fluent_emoji_3d"):
        (directory / style).mkdir(parents=True, exist_ok=True)
        lines = []
        for number, (name, keywords, data) in enumerate(entries):
            file = f"{style}/{number:04x}.png"
            if data is not None:
                (directory / file).write_bytes(data)
            rest = {"emoji": "?", "group": "Symbols", "subgroup": "keycap", "skin_tone": "skin tone" in name}
            lines.append(json.dumps({"file": file, "name": name, "keywords": keywords, **rest}))
        (directory / style / "captions.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def emojis(tmp_path_factory):
    place = tmp_path_factory.mktemp("emoji")
    entries = [(name, ["first", "second"], picture((9, 200, 30))) for names in NAMES.values() for name in names]
    entries += [("broken", ["x"], b"no picture"), ("lost", ["x"], None), ("plain", [], picture((1, 2, 3)))]
    emoji(place / "source", entries)
    half = np.zeros((SIZE, SIZE, 4), np.uint8)
    half[:, : SIZE // 2] = (40, 120, 240, 255)  # blue, green, red, opaque
    half[:, SIZE // 2 :] = (40, 120, 240, 51)
    half[0] = 0
    cv2.imwrite(str(place / "source" / "noto_emoji" / "0000.png"), half)
    return DataConfig(name="emoji", source=str(place / "source"), image_size=SIZE, dir=str(place / "data")), place


def test_emoji_fall_into_splits_by_their_name_without_skin_tone(emojis):
    config, _ = emojis
    for split, names in NAMES.items():
        found = set(by_caption(load_source(config, split))) - {"a flat emoji of plain", "a 3D emoji of plain"}
        assert found == {f"a {style} emoji of {name}" for style in ("flat", "3D") for name in names}


def test_emoji_come_without_their_skin_tones_where_that_is_asked(emojis, tmp_path):
    config = dataclasses.replace(emojis[0], skin_tones=False, dir=str(tmp_path))
    every, plain = (set(by_caption(load_source(c))) for c in (emojis[0], config))
    assert every - plain == {f"a {style} emoji of OK hand: dark skin tone" for style in ("flat", "3D")}
    assert plain < every


def test_emoji_are_said_with_and_without_keywords(emojis):
    source = load_source(emojis[0])
    assert said(source) == set(source.captions())
    assert {"a flat emoji of anchor", "a flat emoji of anchor, first, second", "a 3D emoji of plain"} <= set(source.captions())
    assert not any(caption.startswith("a 3D emoji of plain,") for caption in source.captions())


def test_transparency_lies_on_white(emojis):
    image = by_caption(load_source(emojis[0]))["a flat emoji of anchor"]
    assert (image[0] == 255).all()
    assert (image[1:, : SIZE // 2] == (240, 120, 40)).all()
    assert (image[1:, SIZE // 2 :] == (252, 228, 212)).all()  # a fifth of the colour, four of white
    assert decode(picture((5, 6, 7, 0)))[0, 0].tolist() == [255, 255, 255]


def test_emoji_that_cannot_be_read_are_left_out_and_counted(emojis, capfd):
    config, place = emojis
    load_source(config, "validation")
    assert problems(place) == [{"unreadable": 4}]
    captions = [c for split in NAMES for c in load_source(config, split).captions()]
    assert not any("broken" in c or "lost" in c for c in captions)
    assert capfd.readouterr().err == ""  # prepared once


def test_one_style_of_emoji_is_a_set_too(tmp_path):
    emoji(tmp_path / "source", [("anchor", [], picture((0, 0, 0)))])
    (tmp_path / "source" / "noto_emoji" / "captions.jsonl").unlink()
    config = DataConfig(name="emoji", source=str(tmp_path / "source"), image_size=SIZE, dir=str(tmp_path / "data"))
    assert list(load_source(config).captions()) == ["a 3D emoji of anchor"]
    assert told(config, "test") == "emoji has no split 'test'; it has train"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", r"noto_emoji/captions\.jsonl, line 2: Expecting value"),
        ('{"file": "noto_emoji/0001.png"}', r"noto_emoji/captions\.jsonl, line 2: .*'name'"),
        ('["noto_emoji/0001.png", "anchor"]', r"noto_emoji/captions\.jsonl, line 2"),
        ('{"file": "noto_emoji/0001.png", "name": "ice", "keywords": 7}', r"noto_emoji/captions\.jsonl, line 2"),
    ],
)
def test_a_bad_line_of_emoji_is_told_by_its_number(tmp_path, line, message):
    emoji(tmp_path / "source", [("anchor", ["x"], picture((0, 0, 0)))])
    index = tmp_path / "source" / "noto_emoji" / "captions.jsonl"
    index.write_text(index.read_text() + line + "\n")
    config = DataConfig(name="emoji", source=str(tmp_path / "source"), dir=str(tmp_path / "data"))
    assert re.search(message, told(config))
    assert not list((tmp_path / "data").rglob("*array_record*"))


def test_emoji_without_an_index_are_told(tmp_path):
    (tmp_path / "noto_emoji").mkdir()
    assert "has neither noto_emoji nor fluent_emoji_3d with a captions.jsonl" in told(
        DataConfig(name="emoji", source=str(tmp_path), dir=str(tmp_path / "data"))
    )


# --- Flickr8k ---------------------------------------------------------------------------------------------------------


def flickr8k(directory, lists, captions, pictures):
    """The layout as published: lists of picture names by split, captions by "name#number", pictures in a folder."""
    (directory / "Flicker8k_Dataset").mkdir(parents=True)
    for split, names in lists.items():
        (directory / f"Flickr_8k.{split}Images.txt").write_text("".join(f"{name}\n" for name in names))
    lines = [f"{name}#{k}\t{caption} .\n" for name, several in captions.items() for k, caption in enumerate(several)]
    (directory / "Flickr8k.token.txt").write_text("".join(lines))
    for name, data in pictures.items():
        (directory / "Flicker8k_Dataset" / name).write_bytes(data)


def photograph(grey):
    return picture((grey,) * 3, 40, ".jpg")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    place = tmp_path_factory.mktemp("flickr8k")
    names = [f"{k}_ab.jpg" for k in range(10)]
    flickr8k(
        place / "source",
        {"train": [*names[:6], "lost.jpg", "broken.jpg", "unsaid.jpg"], "dev": names[6:8], "test": names[8:]},
        {name: [f"A dog {k} on picture {name}" for k in range(5)] for name in [*names, "lost.jpg", "broken.jpg"]},
        {name: photograph(20 * k) for k, name in enumerate(names)} | {"broken.jpg": b"", "unsaid.jpg": photograph(3)},
    )
    return DataConfig(name="flickr8k", source=str(place / "source"), image_size=SIZE, dir=str(place / "data")), place


def test_flickr8k_keeps_its_splits_and_five_captions(photographs):
    config, place = photographs
    for split, numbers in {"train": range(6), "validation": (6, 7), "test": (8, 9)}.items():
        source = load_source(config, split)
        pairs = {captions[0].split()[-1]: (image, captions) for image, captions in (source[i] for i in range(len(source)))}
        assert set(pairs) == {f"{k}_ab.jpg" for k in numbers}
        for name, (image, captions) in pairs.items():
            assert captions == [f"A dog {k} on picture {name}" for k in range(5)]  # no " ." at their ends
            assert np.abs(image.astype(int) - 20 * int(name[0])).max() <= 2
        assert source.crop == (split == "train")
        assert not source.flip
    assert said(load_source(config)) == set(load_source(config).captions())
    assert problems(place) == [{"unreadable": 2, "no caption": 1}]


def test_flickr8k_that_lacks_files_is_told(tmp_path):
    pictures = {"a.jpg": photograph(9)}
    flickr8k(tmp_path / "source", {"train": ["a.jpg"]}, {"a.jpg": ["A dog"]}, pictures)
    config = DataConfig(name="flickr8k", source=str(tmp_path / "source"), image_size=SIZE, dir=str(tmp_path / "data"))
    assert list(load_source(config).captions()) == ["A dog"]
    assert "no split 'validation'; it has train" in told(config, "validation")
    tokens = tmp_path / "source" / "Flickr8k.token.txt"
    for text, message in (
        ("a.jpg#0\tA dog .\na.jpg#1 no tab\n", r"Flickr8k\.token\.txt, line 2: no tab"),
        ("b.jpg#0\tA cat .\n", "not one readable picture with a caption"),
    ):
        tokens.write_text(text)
        assert re.search(message, told(config))
    tokens.unlink()
    assert "has no Flickr8k.token.txt: give the unpacked Flickr8k" in told(config)
    (tmp_path / "source" / "Flickr_8k.trainImages.txt").unlink()
    assert "has no Flickr_8k.trainImages.txt" in told(config)


def test_a_photograph_listed_twice_is_taken_once(tmp_path):
    flickr8k(tmp_path / "source", {"train": ["a.jpg", "a.jpg"]}, {"a.jpg": ["A dog"]}, {"a.jpg": photograph(9)})
    config = DataConfig(name="flickr8k", source=str(tmp_path / "source"), image_size=SIZE, dir=str(tmp_path / "data"))
    assert list(load_source(config).captions()) == ["A dog"]
    assert problems(tmp_path) == [{"listed twice": 1}]


# --- TFDS -------------------------------------------------------------------------------------------------------------


class JaxgenTestSet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A small set of the catalogue's kind. Registered below under several names, with several features."""

    VERSION = tfds.core.Version("1.0.0")
    features: dict = {}  # noqa: RUF012

    def _info(self):
        image = {"image": tfds.features.Image(shape=(None, None, 3))}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(image | self.features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples(range(6)), "valid": self._generate_examples(range(6, 8))}

    def _generate_examples(self, numbers):
        for k in numbers:
            yield k, {"image": picture((20 * k,) * 3), **self.fields(k)}


class JaxgenLabelled(JaxgenTestSet):
    features = {"label": tfds.features.ClassLabel(names=["red_panda", "dog"])}  # noqa: RUF012

    def fields(self, k):
        return {"label": k % 2}


class JaxgenCaptioned(JaxgenTestSet):
    features = {"captions": {"text": tfds.features.Sequence(tfds.features.Text())}}  # noqa: RUF012

    def fields(self, k):
        return {"captions": {"text": [f"picture {k}", f"shade {k}"]}}


class JaxgenSilent(JaxgenTestSet):
    features = {"number": tfds.features.Scalar(np.int64)}  # noqa: RUF012

    def fields(self, k):
        return {"number": k}


class JaxgenHeavy(JaxgenTestSet):
    """Its preparation asks for TensorFlow, as that of the catalogue's sets does."""

    features = JaxgenLabelled.features

    def _generate_examples(self, numbers):
        import tensorflow

        yield tensorflow.io


def of_tfds(place, name, **more):
    return DataConfig(name=f"tfds:{name}", source=str(place / "tfds"), image_size=SIZE, dir=str(place / "data"), **more)


@pytest.fixture
def no_tensorflow(monkeypatch):
    """Importing TensorFlow fails as it does where it is not installed."""

    class Absent:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "tensorflow":
                raise ModuleNotFoundError("No module named 'tensorflow'", name=name)

    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])


def test_class_labels_become_captions(tmp_path, no_tensorflow):
    config = of_tfds(tmp_path, "jaxgen_labelled", caption_template="a photo of a {label}")
    source = load_source(config)
    pairs = sorted((int(image[0, 0, 0]), captions) for image, captions in (source[i] for i in range(len(source))))
    labels = ("red panda", "dog")
    assert pairs == [(20 * k, [f"a photo of a {labels[k % 2]}"]) for k in range(6)]
    held = load_source(config, "validation")  # "valid" there
    assert sorted(int(held[i][0][0, 0, 0]) for i in range(len(held))) == [120, 140]
    other = load_source(of_tfds(tmp_path, "jaxgen_labelled", caption_template="one {label}"))
    assert set(other.captions()) == {"one red panda", "one dog"}


def test_a_caption_feature_is_read(tmp_path, no_tensorflow):
    source = load_source(of_tfds(tmp_path, "jaxgen_captioned"))
    assert sorted(source[i][1] for i in range(len(source))) == [[f"picture {k}", f"shade {k}"] for k in range(6)]
    assert said(source) == {f"{word} {k}" for word in ("picture", "shade") for k in range(6)}
    assert "no split 'test'; it has train, validation" in told(of_tfds(tmp_path, "jaxgen_captioned"), "test")


def test_a_set_that_says_nothing_asks_for_a_template(tmp_path, no_tensorflow):
    for name in ("jaxgen_silent", "jaxgen_labelled"):
        message = told(of_tfds(tmp_path, name))
        assert message.startswith(f"tfds:{name} has no caption feature among image, ")
        assert message.endswith('give data.caption_template, as in "a photo of a {label}"')
    assert not list((tmp_path / "data").rglob("*array_record*"))


def test_a_set_that_tfds_does_not_know_is_told(tmp_path):
    assert "data.name=tfds:jaxgen_nowhere: TFDS knows no such set" in told(of_tfds(tmp_path, "jaxgen_nowhere"))


def test_records_that_cannot_be_read_by_index_are_told(tmp_path):
    config = of_tfds(tmp_path, "jaxgen_captioned")
    load_source(config)
    (info,) = (tmp_path / "tfds").rglob("dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))  # as TFDS prepares sets by default
    shutil.rmtree(tmp_path / "data")
    message = told(config)
    assert message.startswith(f"tfds:jaxgen_captioned was prepared before in {info.parent} as tfrecord")
    assert "set data.source to another directory" in message


def test_preparing_that_needs_tensorflow_names_the_extra(tmp_path, no_tensorflow):
    message = told(of_tfds(tmp_path, "jaxgen_heavy", caption_template="a {label}"))
    assert message.startswith("tfds:jaxgen_heavy cannot be prepared (")
    assert 'install TensorFlow once for that: `uv sync --extra tf` or `pip install "jaxgen[tf]"`' in message


# --- Own pictures -----------------------------------------------------------------------------------------------------


def test_runs_that_prepare_a_set_at_the_same_time_share_it(tmp_path):
    class Slow(Scenes):
        def examples(self, split):
            yield from super().examples(split)
            prepare("scenes", Scenes(16, 8), tmp_path)  # another run was faster

    builder = prepare("scenes", Slow(16, 8), tmp_path)
    quick = prepare("scenes", Scenes(16, 8), tmp_path)
    assert builder.data_dir == quick.data_dir
    assert len(Records(builder, "train")) == 8
    assert [Records(builder, "train")[i][:2] for i in range(8)] == [Records(quick, "train")[i][:2] for i in range(8)]


def test_two_pictures_train_and_have_no_validation(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("a", "b"):
        (tmp_path / "pictures" / f"{name}.png").write_bytes(picture((1, 2, 3)))
        (tmp_path / "pictures" / f"{name}.txt").write_text(name)
    config = DataConfig(name=f"folder:{tmp_path / 'pictures'}", image_size=SIZE, dir=str(tmp_path / "data"))
    assert sorted(load_source(config).captions()) == ["a", "b"]
    assert told(config, "validation") == "folder has no split 'validation'; it has train (eval.every=0 trains without)"


def test_captions_that_are_not_utf8_are_told_by_their_file(tmp_path):
    (tmp_path / "a.png").write_bytes(picture((1, 2, 3)))
    for name in ("a.txt", "captions.jsonl"):
        (tmp_path / name).write_bytes("un café".encode("latin-1"))
        config = DataConfig(name=f"folder:{tmp_path}", dir=str(tmp_path / "data"))
        assert told(config) == f"{tmp_path / name} is not UTF-8 text (byte 6): save it as UTF-8"


# --- A look before training -------------------------------------------------------------------------------------------


def look(monkeypatch, place, *arguments):
    """train.py --dry_run in this process, in the directory `place`; its exit status."""
    monkeypatch.chdir(place)
    (place / "own.py").write_text("from jaxgen.train.config import *\n\ndef get_config():\n    return RunConfig()\n")
    monkeypatch.setattr(sys, "argv", ["train.py", "--config=own.py", "--dry_run", *arguments])
    try:
        train.main()
    except SystemExit as stopped:
        return stopped.code
    return 0


def test_a_dry_run_counts_tells_and_shows(tmp_path, monkeypatch, capsys):
    pictures = tmp_path / "pictures"
    (pictures / "more").mkdir(parents=True)
    for name, value, size in (("red", (250, 10, 10), 64), ("green", (10, 250, 10), 64), ("more/blue", (10, 10, 250), 8)):
        (pictures / f"{name}.png").write_bytes(picture(value, size))
        (pictures / f"{name}.txt").write_text(f"all {name}\nanother line\n")
    (pictures / "twin.png").write_bytes((pictures / "red.png").read_bytes())
    (pictures / "twin.txt").write_text("red again")
    (pictures / "bad.jpg").write_bytes(b"no picture")
    (pictures / "bad.txt").write_text("a caption")
    (pictures / "silent.png").write_bytes(picture((1, 1, 1)))
    assert look(monkeypatch, tmp_path, f"--config.data.name=folder:{pictures}", "--config.data.image_size=16") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 pictures, 4 with captions (7 captions)"
    assert sorted(lines[1:-1]) == [
        "pictures without a caption: 1 (silent.png)",
        "smaller than data.image_size=16, will be enlarged: 1 (more/blue.png)",
        "the same picture twice: 1 (twin.png)",
        "unreadable pictures: 1 (bad.jpg)",
    ]
    assert lines[-1] == "the first 16 with their captions: dry_run.png"
    page = decode((tmp_path / "dry_run.png").read_bytes())
    # Four cells of 128 in a row, a margin of 6 around each, captions below: green, blue, red, red.
    assert page.shape[1] == 4 * (128 + 6) + 6
    assert [page[70, 70 + 134 * k].tolist() for k in range(4)] == [[10, 250, 10], [10, 10, 250], [250, 10, 10], [250, 10, 10]]
    for k in range(4):
        assert page[134 + 6 :, 6 + 134 * k : 134 * (k + 1)].min() < 100  # words
    assert not [path.name for path in tmp_path.iterdir() if path.name not in ("pictures", "own.py", "dry_run.png")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scenes", "--dry_run is for your own pictures: --config.data.name=folder:PATH"),
        ("folder:nowhere", "data.name=folder:nowhere: no such directory"),
    ],
)
def test_a_dry_run_of_what_is_no_folder_is_refused(tmp_path, monkeypatch, capsys, name, message):
    assert look(monkeypatch, tmp_path, f"--config.data.name={name}") == 2
    captured = capsys.readouterr()
    assert captured.err.strip() == f"error: {message}"
    assert captured.out == ""
    assert not (tmp_path / "dry_run.png").exists()
