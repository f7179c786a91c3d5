import hashlib
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest

from jaxgen.data import builder, registry
from jaxgen.data.config import DataConfig
from jaxgen.data.folder import Folder, dry_run
from jaxgen.data.pipeline import Source, batches, load_source
from jaxgen.errors import UserError
from jaxgen.storage import as_path


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return DataConfig(image_size=16, train_examples=50, dir=str(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def source(config):
    return load_source(config)


def take(source, count, **settings):
    return list(islice(batches(source, seed=3, batch_size=8, caption_dropout=0.25, **settings), count))


def test_prepared_scenes_are_the_rendered_ones(source, config):
    from jaxgen.data import scenes

    assert len(source) == 50
    wanted = {scenes.render(scenes.example("train", i, size=16)[0], 16).tobytes() for i in range(50)}
    assert {source[i][0].tobytes() for i in range(50)} == wanted
    assert len(load_source(config, "test")) == 1000


def test_batches_are_a_function_of_seed_and_step(source):
    whole = take(source, 9)
    for later, batch in zip(take(source, 4, start_step=5), whole[5:], strict=True):
        np.testing.assert_array_equal(later["image"], batch["image"])
        assert later["caption"] == batch["caption"]
    other = next(batches(source, seed=4, batch_size=8))
    assert (other["image"] != whole[0]["image"]).any()


def test_processes_share_the_same_batches(source):
    whole = take(source, 7)
    for count in (2, 4):
        parts = [take(source, 7, process_index=i, process_count=count) for i in range(count)]
        for step, batch in enumerate(whole):
            np.testing.assert_array_equal(np.concatenate([part[step]["image"] for part in parts]), batch["image"])
            assert [c for part in parts for c in part[step]["caption"]] == batch["caption"]


def test_an_epoch_sees_every_picture_once(source):
    seen = [image.tobytes() for batch in islice(batches(source, seed=0, batch_size=10), 5) for image in batch["image"]]
    assert sorted(seen) == sorted(source[i][0].tobytes() for i in range(50))


def test_captions_are_drawn_and_dropped(source):
    captions = [
        c for batch in islice(batches(source, seed=0, batch_size=50, caption_dropout=0.25), 20) for c in batch["caption"]
    ]
    assert abs(np.mean([c == "" for c in captions]) - 0.25) < 0.05
    assert len(set(captions)) > 80  # both captions of most pictures


def test_the_order_has_not_moved(source):
    """A library that shuffles another way would silently change every resumed run."""
    digest = hashlib.sha256()
    for batch in take(source, 20):
        digest.update(batch["image"].tobytes() + repr(batch["caption"]).encode())
    assert digest.hexdigest()[:16] == "51aa6f78b47277bc"


class Records:
    """Encoded pictures by index, some of them broken."""

    def __init__(self, broken, size=24):
        self.broken, self.size = broken, size

    def __len__(self):
        return 20

    def __getitem__(self, index):
        image = np.full((self.size, self.size, 3), index * 10, np.uint8)
        image[:, : self.size // 2] = 255
        return b"broken" if index in self.broken else cv2.imencode(".png", image)[1].tobytes(), [str(index)], ""

    def captions(self):
        return [self[index][1] for index in range(len(self))]


def test_captions_are_read_without_the_records_once_they_are_listed(config, source, monkeypatch):
    captions = [source.captions_of(i) for i in range(len(source))]
    assert captions == [source[i][1] for i in range(len(source))]
    listed = next(Path(config.dir).rglob("captions-train.json"))
    for broken in ("[", "[[]]"):  # half written, and another set's
        listed.write_text(broken)
        assert list(load_source(config).captions()) == list(source.captions())
    monkeypatch.setattr(builder.Records, "__getitem__", lambda self, index: pytest.fail("a record was read"))
    assert list(load_source(config).captions()) == list(source.captions())


def test_a_picture_that_memory_holds_is_decoded_once(monkeypatch):
    source, records = Source(DataConfig(image_size=24), Records({4})), []
    monkeypatch.setattr(
        Records, "__getitem__", lambda self, index, read=Records.__getitem__: records.append(index) or read(self, index)
    )
    for _ in range(2):
        assert [source[index][1] for index in (3, 4)] == [["3"], ["5"]]
    assert records == [3, 4, 5]
    assert source.bad == 1


def test_an_unreadable_picture_is_replaced_by_the_next_and_counted():
    source = Source(DataConfig(image_size=24, keep_in_memory=0), Records({4, 5}))
    image, captions = source[4]
    assert captions == ["6"]
    assert image[0, -1, 0] == 60
    assert source.bad == 2
    with pytest.raises(UserError, match=r"more than data\.max_bad=1"):
        Source(DataConfig(image_size=24, max_bad=1, keep_in_memory=0), Records({4, 5}))[4]


def test_threads_and_memory_give_the_same_batches():
    slow = take(Source(DataConfig(image_size=24, keep_in_memory=0), Records(set())), 6, threads=3)
    fast = take(Source(DataConfig(image_size=24), Records(set())), 6)
    for a, b in zip(slow, fast, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        assert a["caption"] == b["caption"]


def test_mirroring_and_cropping_happen_only_where_allowed():
    plain = take(Source(DataConfig(image_size=24), Records(set())), 4)
    assert all((batch["image"][:, :, 0] == 255).all() for batch in plain)
    flipped = take(Source(DataConfig(image_size=24), Records(set()), flip=True), 4)
    share = np.mean([(image[:, 0] == 255).all() for batch in flipped for image in batch["image"]])
    assert 0.2 < share < 0.8
    cropped = Source(DataConfig(image_size=24), Records(set(), size=27), crop=True)
    assert next(batches(cropped, seed=0, batch_size=8))["image"].shape == (8, 24, 24, 3)


def write(directory, name, value, size=20):
    cv2.imwrite(str(directory / name), np.full((size, size, 3), value, np.uint8))


def test_a_folder_of_ones_own(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for k in range(30):
        write(pictures, f"{k}.png", k * 8)
        (pictures / f"{k}.txt").write_text(f"grey number {k}\na shade\n")
    write(pictures, "lonely.png", 3)
    (pictures / "bad.jpg").write_bytes(b"no picture")
    (pictures / "bad.txt").write_text("a caption")
    report = dry_run(Folder(as_path(pictures)), 32)
    assert (report.pictures, report.pairs, report.captions) == (32, 30, 60)
    assert report.problems["pictures without a caption"] == ["lonely.png"]
    assert report.problems["unreadable pictures"] == ["bad.jpg"]
    assert len(report.sheet) == 16
    config = DataConfig(name=f"folder:{pictures}", image_size=16, dir=str(tmp_path / "data"))
    train, held = load_source(config), load_source(config, "validation")
    assert len(train) + len(held) == 30
    assert set(train.captions()).isdisjoint(set(held.captions()) - {"a shade"})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"file": "a.png", "caption": "x"}\n{"file": "a.png"}', "line 2"),
        ("not json", "line 1"),
        ('{"file": "missing.png", "caption": "x"}', "not one pair"),
    ],
)
def test_captions_that_do_not_fit_are_told(tmp_path, lines, message):
    write(tmp_path, "a.png", 9)
    (tmp_path / "captions.jsonl").write_text(lines)
    with pytest.raises(UserError, match=message):
        load_source(DataConfig(name=f"folder:{tmp_path}", dir=str(tmp_path / "data")))


def test_sets_that_are_not_there_are_told(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, source, message in (
        ("emoji", None, "set data.source"),
        ("emoji", "nowhere", "no such directory"),
        ("flickr8k", "empty", "is empty"),
        ("folder:nowhere", None, "no such directory"),
        (f"folder:{tmp_path / 'empty'}", None, "no pictures"),
        ("tfds", None, "unknown; known"),
        ("coco", None, "unknown; known"),
    ):
        where = None if source is None else str(tmp_path / source)
        with pytest.raises(UserError, match=message):
            registry.recipe(DataConfig(name=name, source=where))[1].identity()
