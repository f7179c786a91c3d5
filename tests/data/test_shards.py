import dataclasses
import hashlib
import http.server
import io
import itertools
import json
import re
import tarfile
import threading
import urllib.parse
from itertools import islice

import cv2
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgen.data import parquet, registry, remote, shards, tar
from jaxgen.data.buckets import shapes
from jaxgen.data.config import DataConfig
from jaxgen.data.parquet import Kept, WindowShuffle
from jaxgen.data.pipeline import batches, load_source
from jaxgen.data.remote import Lost
from jaxgen.data.shards import _held_out, expand, listing
from jaxgen.errors import UserError

SIDE, COUNT, SHARDS = 16, 60, 4


class Server(http.server.ThreadingHTTPServer):
    """Serves parts of `files`; `faults` says of a file what is wrong with it, as often as its list is long."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.asked = {}, {}, []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def handle_error(self, request, client_address):
        pass  # readers that hang up


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        name = urllib.parse.unquote(self.path[1:])
        with self.server.lock:
            self.server.asked.append((name, self.headers["Range"]))
            faults = self.server.faults.get(name, [])
            fault = faults if isinstance(faults, int) else faults.pop(0) if faults else None
        data = self.server.files.get(name)
        if name.startswith("moved/"):
            return self.answer(302, b"", {"Location": "/" + name.removeprefix("moved/")})
        if data is None or isinstance(fault, int):
            return self.answer(404 if data is None else fault, b"")
        if fault == "whole":
            return self.answer(200, data)
        start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        if start >= len(data):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        part = data[start : end + 1]
        told = {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(data)}"}
        if fault == "short":  # fewer bytes than announced, and the line goes dead
            self.answer(206, part[: len(part) // 2], told | {"Content-Length": str(len(part))})
            self.close_connection = True
        elif fault == "reset":
            self.close_connection = True
        elif fault == "once":  # the server keeps no connection, and does not say so
            self.answer(206, part, told)
            self.close_connection = True
        else:
            self.answer(206, part, told)

    def answer(self, status, body, told=()):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | dict(told)).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "WAIT", 0.001)


def picture(number):
    return cv2.imencode(".png", np.full((SIDE, SIDE, 3), (7, number // 250, number % 250), np.uint8))[1].tobytes()


def number_of(image):
    return int(image[0, 0, 0]) + 250 * int(image[0, 0, 1])


def tar_of(files, **settings):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **settings) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5  # WebDataset writes fractions, which makes a pax header
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tar_shards(count=COUNT, each=COUNT // SHARDS):
    """{name: tar}, as img2dataset writes them: picture, json and text of a number side by side."""
    found = {}
    for shard, start in enumerate(range(0, count, each)):
        files = {}
        for k in range(start, min(start + each, count)):
            said = json.dumps({"caption": "not this one", "width": SIDE})
            files |= {f"{k:09d}.png": picture(k), f"{k:09d}.json": said.encode(), f"{k:09d}.txt": f"number {k}\n".encode()}
        found[f"{shard:05d}.tar"] = tar_of(files)
    return found


def parquet_of(numbers, group=5, image=None, captions=None, names=("image", "caption")):
    images = image or pa.array([{"bytes": picture(k), "path": None} for k in numbers])
    table = pa.table({names[0]: images, "width": [SIDE] * len(numbers), names[1]: captions or [f"number {k}" for k in numbers]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=group)
    return buffer.getvalue()


def parquet_shards(count=COUNT, each=COUNT // SHARDS, group=5):
    starts = enumerate(range(0, count, each))
    return {f"{k:05d}.parquet": parquet_of(range(start, min(start + each, count)), group) for k, start in starts}


MAKE = {"tar": tar_shards, "parquet": parquet_shards}
KINDS = pytest.mark.parametrize("kind", MAKE)


def config_of(kind, where, place, **settings):
    last = settings.pop("last", f"{SHARDS - 1:05d}")
    settings = {"keep_in_memory": 0} | settings
    return DataConfig(name=f"{kind}:{where}{{00000..{last}}}.{kind}", image_size=SIDE, dir=str(place / "data"), **settings)


def take(source, count, **settings):
    return list(islice(batches(source, **({"seed": 3, "batch_size": 8} | settings)), count))


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        assert a["caption"] == b["caption"]


def numbers_of(some):
    return [number_of(image) for batch in some for image in batch["image"]]


@KINDS
def test_pictures_and_captions_over_http_are_those_on_the_disk(kind, server, tmp_path):
    server.files = MAKE[kind]()
    for name, data in server.files.items():
        (tmp_path / name).write_bytes(data)
    config = config_of(kind, f"{tmp_path}/", tmp_path / "a")
    local, far = load_source(config), load_source(config_of(kind, server.url(""), tmp_path / "b"))
    assert (local.threads, far.threads) == (4, {"tar": 64, "parquet": 16}[kind])
    for source in (local, far):
        held = load_source(config, "validation")
        told = [
            (number_of(image), captions) for image, captions in (some[i] for some in (source, held) for i in range(len(some)))
        ]
        assert sorted(told) == [(k, [f"number {k}"]) for k in range(COUNT)]
        assert len(held) == 3
        assert list(source.captions()) == [captions[0] for _, captions in told[: len(source)]]
        assert [source.captions_of(i)[0] for i in range(len(source))] == list(source.captions())
    kept = load_source(config_of(kind, server.url(""), tmp_path / "b", keep_in_memory=1))
    assert kept.in_memory
    same(take(far, 8), take(kept, 8))


@KINDS
def test_batches_are_a_function_of_seed_and_step_for_any_number_of_processes(kind, server, tmp_path):
    server.files = MAKE[kind]()
    source = load_source(config_of(kind, server.url(""), tmp_path, threads=6))
    whole = take(source, 20)
    assert sorted(numbers_of(take(source, 1, batch_size=len(source)))) == sorted(
        number_of(source[i][0]) for i in range(len(source))
    )
    for start in (0, 3, 11, 19):
        same(take(source, 20 - start, start_step=start, threads=3), whole[start:])
    for count in (2, 4):
        parts = [take(source, 20, process_index=i, process_count=count) for i in range(count)]
        for step, batch in enumerate(whole):
            np.testing.assert_array_equal(np.concatenate([part[step]["image"] for part in parts]), batch["image"])
            assert [c for part in parts for c in part[step]["caption"]] == batch["caption"]
    assert numbers_of(take(source, 20, seed=4)) != numbers_of(whole)
    for batch in whole:
        assert [f"number {k}" for k in numbers_of([batch])] == batch["caption"]


@KINDS
def test_an_index_is_written_once_and_only_for_what_is_new(kind, server, tmp_path, capsys):
    server.files = MAKE[kind](COUNT + 15)
    config = config_of(kind, server.url(""), tmp_path)
    source = load_source(config)
    assert len(server.asked) >= 2 * SHARDS
    server.asked.clear()
    again = load_source(config)
    assert [*source.captions()] == [*again.captions()]
    assert sorted(server.asked) == [(f"{k:05d}.{kind}", "bytes=0-0") for k in range(SHARDS)]  # their sizes
    server.asked.clear()
    grown = load_source(config_of(kind, server.url(""), tmp_path, last=f"{SHARDS:05d}"))
    assert {name for name, part in server.asked if part != "bytes=0-0"} == {f"{SHARDS:05d}.{kind}"}
    assert (
        len(grown) + len(load_source(config_of(kind, server.url(""), tmp_path, last=f"{SHARDS:05d}"), "validation"))
        == COUNT + 15
    )
    server.asked.clear()
    server.files[f"00001.{kind}"] = MAKE[kind](14, 14)[f"00000.{kind}"]
    changed = load_source(config)
    assert {name for name, part in server.asked if part != "bytes=0-0"} == {f"00001.{kind}"}
    assert len(changed) + len(load_source(config, "validation")) == COUNT - 1
    assert "left out" not in capsys.readouterr().err


def test_indexing_that_was_cut_short_goes_on(server, tmp_path, monkeypatch):
    server.files = tar_shards()
    config = config_of("tar", server.url(""), tmp_path)

    class Stop(Exception):
        pass

    def stopping(url, *rest):
        if "00002" in url:
            raise Stop
        return tar.scan(url, *rest)

    monkeypatch.setattr(shards, "SCANS", 1)
    monkeypatch.setitem(registry.RECIPES, "tar", lambda c, p: registry._shards(c, tar.FORMAT._replace(scan=stopping), p))
    with pytest.raises(Stop):
        load_source(config)
    monkeypatch.undo()
    server.asked.clear()
    assert len(load_source(config)) == COUNT - 3
    looked_through = {name for name, part in server.asked if part != "bytes=0-0"}
    assert {"00002.tar"} <= looked_through <= {"00002.tar", "00003.tar"}  # another may have been under way


@KINDS
def test_what_passes_is_tried_again(kind, server, tmp_path):
    server.files = MAKE[kind]()
    config = config_of(kind, server.url(""), tmp_path / "a")
    wanted = take(load_source(config), 12)
    server.faults = {name: [500, "short", "reset", 503] for name in server.files}
    shaky = load_source(config_of(kind, server.url(""), tmp_path / "b"))
    assert not any(server.faults.values())
    server.faults = {name: [429, "short", "reset", "short", 502] for name in server.files}
    same(take(shaky, 12), wanted)
    assert not any(server.faults.values())
    assert not shaky.records.losses.why


def test_waits_grow_and_end(server, monkeypatch):
    waits = []
    monkeypatch.setattr(remote, "WAIT", 1.0)
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    server.files, server.faults = {"a": b"content", "b": b"content", "c": b""}, {"a": 503}
    with pytest.raises(Lost, match=r"HTTP status 503 \(tried 6 times\)"):
        remote.read(server.url("a"), 0, 3)
    assert len(waits) == 5
    assert all(0.5 * 2**k <= wait <= 1.5 * 2**k for k, wait in enumerate(waits))
    assert len(set(np.array(waits) / 2 ** np.arange(5))) == 5  # not all hosts at the same moment
    waits.clear()
    assert remote.read(server.url("b"), 2, 3) == b"nte"
    assert remote.size(server.url("b")) == 7
    for what, why in (("missing", "HTTP status 404"), ("c", "416"), ("b", "parts of files")):
        server.faults["b"] = ["whole"]
        with pytest.raises(Lost, match=why):
            remote.read(server.url(what), 0, 3)
    assert waits == []


def test_connections_are_kept_and_made_anew_where_they_are_gone(server, monkeypatch):
    waits, made, make = [], [], remote._connection
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    monkeypatch.setattr(remote, "_connection", lambda *where: made.append(where) or make(*where))
    server.files = {"a b?.tar": bytes(range(256)) * 4000}
    for k in range(5):
        assert remote.read(server.url("a b%3F.tar"), 255 + k, 500_000) == server.files["a b?.tar"][255 + k :][:500_000]
    assert len(made) == 1
    server.faults = {"a b?.tar": ["once"]}
    for _ in range(2):
        assert remote.read(server.url("a b%3F.tar"), 1, 2) == b"\1\2"
    assert len(made) == 2
    assert remote.read(server.url("moved/moved/a b%3F.tar"), 3, 2) == b"\3\4"
    with pytest.raises(Lost, match="HTTP status 302"):
        remote.read(server.url("moved/" * 6 + "a b%3F.tar"), 3, 2)
    assert waits == []


def test_files_on_a_disk_and_in_an_object_store(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    fsspec.filesystem("memory").pipe("/bucket/a", b"content")
    for place in (str(tmp_path), "memory://bucket"):
        assert remote.size(f"{place}/a") == 7
        assert remote.read(f"{place}/a", 3, 2) == b"te"
        with pytest.raises(Lost, match="no such file"):
            remote.size(f"{place}/b")
        with pytest.raises(Lost, match=r"1 bytes came, 4 were asked for \(tried"):
            remote.read(f"{place}/a", 6, 4)


def test_a_set_in_an_object_store(tmp_path):
    store = fsspec.filesystem("memory")
    for name, data in parquet_shards().items():
        store.pipe(f"/set/{name}", data)
    source = load_source(config_of("parquet", "memory://set/", tmp_path))
    assert source.threads == 16
    assert sorted(numbers_of(take(source, 1, batch_size=len(source)))) == sorted(int(c.split()[1]) for c in source.captions())


def bad_shards(kind, good):
    """By name: what is wrong, and how it is told."""
    whole = good[f"00000.{kind}"]
    return {
        f"00004.{kind}": (None, "HTTP status 404"),
        f"00005.{kind}": (
            whole[: len(whole) // 2 + 700],
            "cut short at byte" if kind == "tar" else "cannot be read as parquet",
        ),
        f"00006.{kind}": (b"<html>no such bucket</html>" * 100, "no tar" if kind == "tar" else "cannot be read as parquet"),
        f"00007.{kind}": (b"", "HTTP status 416"),
        f"00008.{kind}": (whole, "HTTP status 500 (tried 6 times)"),
    }


@KINDS
def test_bad_shards_are_named_skipped_and_counted(kind, server, tmp_path, capsys):
    server.files = good = MAKE[kind]()
    wanted = take(load_source(config_of(kind, server.url(""), tmp_path / "good")), 9)
    bad = bad_shards(kind, good)
    server.files = good | {name: data for name, (data, _) in bad.items() if data is not None}
    server.faults = {f"00008.{kind}": 500}
    capsys.readouterr()
    config = config_of(kind, server.url(""), tmp_path / "bad", last="00008", max_bad_shards=5)
    source = load_source(config)
    told = capsys.readouterr().err
    for name, (_, why) in bad.items():
        assert len(re.findall(rf"left out {re.escape(server.url(name))}: .*{re.escape(why)}", told)) == 1, name
    assert "5 of 9 shards are left out" in told
    same(take(source, 9), wanted)
    again = load_source(config)
    assert "5 of 9 shards are left out" in capsys.readouterr().err
    same(take(again, 9), wanted)
    with pytest.raises(UserError, match=r"5 of 9 shards cannot be read, more than data\.max_bad_shards=4 \(http"):
        load_source(config_of(kind, server.url(""), tmp_path / "bad", last="00008", max_bad_shards=4))
    with pytest.raises(UserError, match=r"cannot be read, more than data\.max_bad_shards=1 \(http"):
        load_source(config_of(kind, server.url(""), tmp_path / "new", last="00008", max_bad_shards=1))
    server.files = {}
    with pytest.raises(UserError, match=r"4 of 4 shards cannot be read, all of them \(.*HTTP status 404"):
        load_source(config_of(kind, server.url(""), tmp_path / "none"))


@KINDS
def test_a_shard_lost_while_training_is_replaced_by_pictures_of_the_others(kind, server, tmp_path, capsys):
    server.files = MAKE[kind]()
    for name, data in server.files.items():
        (tmp_path / name).write_bytes(data)
    before = take(load_source(config_of(kind, f"{tmp_path}/", tmp_path)), 12)
    source = load_source(config_of(kind, server.url(""), tmp_path))
    strict = load_source(config_of(kind, server.url(""), tmp_path, max_bad_shards=1))
    server.faults, lost = {f"00001.{kind}": 403}, set(range(15, 30))
    capsys.readouterr()
    after = take(source, 12)
    assert capsys.readouterr().err == f"data: left out {server.url('00001')}.{kind}: HTTP status 403\n"
    places = list(zip(numbers_of(before), numbers_of(after), strict=True))
    assert all(a == b for a, b in places if a not in lost)
    instead = [b for a, b in places if a in lost]
    assert not lost & set(instead)
    assert len(set(instead)) > 0.6 * len({a for a, _ in places if a in lost})
    assert all([f"number {k}" for k in numbers_of([batch])] == batch["caption"] for batch in after)
    assert source.bad == 0
    same(take(source, 5, start_step=7, threads=3), after[7:])
    server.faults |= {f"00002.{kind}": 403}
    with pytest.raises(UserError, match=r"2 of 4 shards cannot be read, more than data\.max_bad_shards=1"):
        take(strict, 12)


# Heights and widths, and the shape of a square of 16 pixels in which each is to be seen.
SIZES = {(90, 60): (20, 12), (60, 90): (12, 20), (50, 50): (16, 16), (10, 80): (12, 20)}


def numbered(k, size):
    return cv2.imencode(".png", np.full((*size, 3), (7, 0, k), np.uint8))[1].tobytes()


@KINDS
def test_pictures_keep_their_proportions_in_batches_of_one_shape(kind, server, tmp_path, capsys, monkeypatch):
    sizes, shards = [*SIZES], range(0, COUNT, COUNT // SHARDS)
    data = [numbered(k, sizes[k % 4]) if k != 7 else b"broken" for k in range(COUNT)]
    for shard, start in enumerate(shards):
        some = range(start, start + COUNT // SHARDS)
        named = {f"{k}.{end}": body for k in some for end, body in (("png", data[k]), ("txt", f"number {k}".encode()))}
        images = pa.array([{"bytes": data[k]} for k in some])
        server.files[f"{shard:05d}.{kind}"] = tar_of(named) if kind == "tar" else parquet_of(some, image=images)
    config = config_of(kind, server.url(""), tmp_path, max_aspect_ratio=2.0, threads=4)
    among = shapes(SIDE, 2.0)[::2]
    source, kept = (load_source(dataclasses.replace(config, keep_in_memory=size), shapes=among) for size in (0, 1))
    assert "left out 1 unreadable" in capsys.readouterr().err
    if kind == "parquet":
        monkeypatch.setattr(source.records, "window", 2)
        monkeypatch.setattr(kept.records, "window", 2)
    whole = take(source, 60, batch_size=4)
    shown = {batch["image"].shape for batch in whole}
    assert shown == {(4, *shape, 3) for shape in SIZES.values()}
    for batch in whole:
        assert [f"number {k}" for k in numbers_of([batch])] == batch["caption"]
        assert {SIZES[sizes[k % 4]] for k in numbers_of([batch])} == {batch["image"].shape[1:3]}
    seen = np.bincount(numbers_of(whole), minlength=COUNT)
    assert (seen[[number_of(source[i][0]) for i in range(len(source))]] >= 240 // len(source) - 2).all()
    assert source.bad == 0
    same(take(source, 20, batch_size=4, start_step=40), whole[40:])
    parts = [take(source, 60, batch_size=4, process_index=i, process_count=2) for i in range(2)]
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[step]["image"] for part in parts]), batch["image"])
    same(take(kept, 60, batch_size=4), whole)
    # Validation is of squares, by the same index.
    server.asked.clear()
    held = load_source(config, "validation")
    assert {held[i][0].shape for i in range(len(held))} == {(16, 16, 3)}
    assert len(server.asked) <= SHARDS + 2 * len(held)


def test_an_unreadable_picture_is_replaced_and_counted(tmp_path):
    files = {f"{k}.png": picture(k) if k != 5 else b"broken" for k in range(40)}
    (tmp_path / "a.tar").write_bytes(tar_of(files | {f"{k}.txt": f"number {k}".encode() for k in range(40)}))
    config = DataConfig(name=f"tar:{tmp_path}/a.tar", image_size=SIDE, dir=str(tmp_path / "data"), keep_in_memory=0)
    source = load_source(config)
    place = [*source.captions()].index("number 5")
    image, captions = source[place]
    assert captions == [f"number {number_of(image)}"]
    assert source.bad == 1


def test_what_counts_as_a_picture_and_its_caption(tmp_path, capsys):
    files = {
        "a/1.x.png": picture(1),  # its key ends at the first dot
        "a/1.jpg": picture(10),
        "a/1.txt": b"  one\r\n line ",
        "b/1.PNG": picture(2),
        "b/1.txt": b"   ",
        "b/1.json": json.dumps({"caption": ["two", "zwei"], "alt": "other"}).encode(),
        "b/3.png": picture(3),
        "b/4.txt": b"nothing to see",
        "b/5.json": b"no json",
        "b/5.png": picture(5),
        "b/.png": picture(6),
        "./c.webp": picture(7),
        "./c.json": json.dumps({"alt": "seven"}).encode(),
        "c.cls": b"3",
    }
    data = tar_of(files)
    (tmp_path / "a.tar").write_bytes(data)
    found = tar.scan(str(tmp_path / "a.tar"), len(data), None)
    assert found.captions == [["one line"], ["two", "zwei"]]
    assert found.problems == {"without a caption": 3}
    read = [data[row["offset"] :][: row["length"]] for row in found.rows]
    assert read == [picture(10), picture(2)]
    assert tar.scan(str(tmp_path / "a.tar"), len(data), "alt").captions == [["other"], ["seven"]]
    load_source(DataConfig(name=f"tar:{tmp_path}/a.tar", image_size=SIDE, dir=str(tmp_path / "data")))
    assert "left out 3 without a caption" in capsys.readouterr().err
    assert sorted(tar.scan(str(tmp_path / "a.tar"), len(data), None).keys) == sorted(set(found.keys))


names = st.text(st.sampled_from("ab./é-"), min_size=1, max_size=180).filter(lambda name: name.strip("/.") and name[-1] != "/")


@given(
    st.dictionaries(names, st.tuples(st.sampled_from("fdlp"), st.binary(max_size=1300)), max_size=6),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_are_those_that_the_standard_library_finds(entries, form):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, pax_headers={"comment": "of all"}) as archive:
        for name, (kind, data) in entries.items():
            info = tarfile.TarInfo(name)
            info.mtime, info.linkname = 1.5, "a" * len(name)
            info.type = {"f": tarfile.REGTYPE, "d": tarfile.DIRTYPE, "l": tarfile.SYMTYPE, "p": tarfile.FIFOTYPE}[kind]
            info.size = len(data) if kind == "f" else 0
            try:
                archive.addfile(info, io.BytesIO(data))
            except ValueError:  # ustar has no room for it
                continue
        archive.addfile(tarfile.TarInfo("last"))
    data = buffer.getvalue()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        wanted = [(info.name, info.offset_data, info.size) for info in archive if info.isreg()]
    found = list(tar.members(lambda offset, length: data[offset : offset + length], len(data)))
    assert found == wanted


def test_sizes_beyond_octal_and_damaged_headers():
    info = tarfile.TarInfo("big.jpg")
    info.size = 2**33 + 5
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        data = info.tobuf(form)
        found = next(tar.members(lambda offset, length, data=data: data[offset : offset + length], 2**34))
        assert found == ("big.jpg", len(data), 2**33 + 5)
    good = tar_of({"a.txt": b"x", "b.txt": b"y"})
    for place in (2048 + 3, 3):  # a letter of a name
        bad = good[:place] + b"\xff" + good[place + 1 :]
        with pytest.raises(Lost, match="no tar" if place == 3 else "no tar's header at byte"):
            list(tar.members(lambda offset, length, data=bad: data[offset : offset + length], len(bad)))


word = st.text(st.sampled_from("abz/.-_0"), max_size=4)
span = st.tuples(st.integers(0, 120), st.integers(0, 12), st.integers(1, 5)).map(
    lambda t: (f"{t[0]:0{t[2]}d}..{t[0] + t[1]:0{t[2]}d}", [f"{k:0{t[2]}d}" for k in range(t[0], t[0] + t[1] + 1)])
)
choice = st.lists(word, min_size=2, max_size=4).map(lambda words: (",".join(words), words))


@given(st.lists(st.tuples(word, st.one_of(span, choice)), max_size=3), word)
def test_braces_are_expanded_as_a_shell_does(parts, end):
    pattern = "".join(f"{before}{{{brace}}}" for before, (brace, _) in parts) + end
    pieces = [piece for before, (_, options) in parts for piece in ([before], options)] + [[end]]
    assert expand(pattern) == ["".join(some) for some in itertools.product(*pieces)]


def test_patterns(tmp_path):
    assert expand("s{8..11}") == ["s8", "s9", "s10", "s11"]
    assert expand("s{08..11}")[0] == "s08"
    assert expand("{a,b{1..2}}c") == ["ac", "b1c", "ac", "b2c"]
    for bad in ("{3..1}", "{x}", "{}", "a{b", "a}b"):
        with pytest.raises(UserError, match=r"brace|neither"):
            expand(bad)
    for name in ("b.tar", "a.tar", "a.parquet"):
        (tmp_path / name).write_bytes(b"")
    inside = [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    assert listing(str(tmp_path), ".tar") == listing(f"{tmp_path}/", ".tar") == inside
    assert listing(f"{tmp_path}/{{b,a}}.tar,{tmp_path}/a.tar, http://h/{{1..2}}.tar", ".tar") == [
        *inside[::-1],
        "http://h/1.tar",
        "http://h/2.tar",
    ]
    for pattern, message in (("http://h/dir/", "HTTP lists no directories"), (",", "names no shard"), ("", "names no shard")):
        with pytest.raises(UserError, match=message):
            listing(pattern, ".tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.tar files in it"):
        listing(str(tmp_path / "empty"), ".tar")
    with pytest.raises(UserError, match=r"tar:SHARDS, parquet:SHARDS"):
        registry.recipe(DataConfig(name="tar"))


def test_columns_of_parquet(tmp_path):
    binaries = pa.array([picture(k) for k in range(6)])
    named = {
        "jpg": parquet_of(range(6), image=binaries, names=("jpg", "text")),
        "lists": parquet_of(range(6), captions=[[f"a {k}", f" b\n{k}"] for k in range(6)], names=("photo", "sentences")),
        "gaps": parquet_of(range(6), captions=["a", None, "", " c ", "d", "e"], group=4),
    }
    for name, data in named.items():
        (tmp_path / name).write_bytes(data)
    scans = {name: parquet.scan(str(tmp_path / name), len(data), None) for name, data in named.items()}
    assert scans["jpg"].captions == [[f"number {k}"] for k in range(6)]
    assert scans["lists"].captions[2] == ["a 2", "b 2"]
    assert scans["gaps"].captions == [["a"], ["c"], ["d"], ["e"]]
    assert scans["gaps"].rows[["group", "row"]].tolist() == [(0, 0), (0, 3), (1, 0), (1, 1)]
    assert scans["gaps"].problems == {"without a caption": 2}
    assert (scans["gaps"].rows["bytes"] > len(picture(0)) / 2).all()
    for names, message in ((("image", "alt"), "no column of captions among image, width, alt"), (("alt", "x"), "captions")):
        data = parquet_of(range(6), names=names)
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(Lost, match=message):
            parquet.scan(str(tmp_path / "bad"), len(data), None)
        assert parquet.scan(str(tmp_path / "bad"), len(data), names[1]).captions[0] == ["number 0"]
    data = parquet_of(range(6), image=pa.array(list("abcdef")))
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(Lost, match="no column of encoded pictures"):
        parquet.scan(str(tmp_path / "bad"), len(data), None)


def test_a_picture_that_is_null_is_replaced(tmp_path):
    images = pa.array([{"bytes": picture(k)} if k % 2 else None for k in range(40)])
    (tmp_path / "a.parquet").write_bytes(parquet_of(range(40), image=images))
    config = DataConfig(name=f"parquet:{tmp_path}", image_size=SIDE, dir=str(tmp_path / "data"), keep_in_memory=0)
    source = load_source(config)
    seen = {number_of(source[i][0]) for i in range(len(source))}
    assert all(k % 2 for k in seen)
    assert source.bad >= 18


def order_of(starts, window, seed=0, batch_size=8, count=None):
    order = WindowShuffle(np.asarray(starts), window, seed, batch_size)
    return np.array([order[k] for k in range(count if count is not None else starts[-1])])


STARTS = np.cumsum([0, *np.random.default_rng(0).integers(1, 20, 40)])


@pytest.mark.parametrize("batch_size", [1, 8, 1000])
def test_each_epoch_of_windows_has_every_picture_once(batch_size):
    total = int(STARTS[-1])
    three = order_of(STARTS, 4, batch_size=batch_size, count=3000 * total // 1000)
    if batch_size == 1000:  # a batch of more than one epoch, in rising order
        assert (np.diff(three[:1000]) >= 0).all()
        assert np.bincount(three[:1000], minlength=total).min() >= 1000 // total
    else:
        count = total // batch_size * batch_size  # the batch that straddles two epochs is in order, too
        assert len(set(three[:count])) == count
        assert sorted(three[:total]) == list(range(total)) or batch_size > 1
        assert (three[:count] != three[total : total + count]).any()


def test_windows_mix_their_row_groups_and_no_others():
    group = np.repeat(np.arange(40), np.diff(STARTS))
    order = group[order_of(STARTS, 4, batch_size=1)]
    first = list(dict.fromkeys(order))
    for k in range(0, 40, 4):
        some = order[np.isin(order, first[k : k + 4])]
        assert (np.diff(some) != 0).mean() > 0.4  # next to each other are mostly pictures of different groups
        places = np.flatnonzero(np.isin(order, first[k : k + 4]))
        assert places[-1] - places[0] + 1 == len(places)
    assert first != sorted(first)
    whole = order_of(STARTS, 40, batch_size=1)
    assert abs(np.corrcoef(whole, np.arange(len(whole)))[0, 1]) < 0.15


def test_each_process_reads_its_own_row_groups():
    """Four processes, windows of 16 groups: each meets a quarter of a window's groups, and those at the seams."""
    starts = np.arange(0, 64 * 50 + 1, 50)
    order = WindowShuffle(starts, 16, 0, 80)
    met = [{order[step * 80 + place] // 50 for step in range(10) for place in range(p * 20, p * 20 + 20)} for p in range(4)]
    assert len(set().union(*met)) == 16
    assert all(4 <= len(some) <= 7 for some in met)


def test_the_order_of_windows_has_not_moved():
    digest = hashlib.sha256(order_of(STARTS, 4, seed=3, count=2000).astype(np.int64).tobytes())
    assert digest.hexdigest()[:16] == "5a0a18fb8d80790b"


def test_row_groups_are_read_once_an_epoch(server, tmp_path, monkeypatch):
    server.files = parquet_shards(480, 120, 6)
    source = load_source(config_of("parquet", server.url(""), tmp_path, threads=2))
    monkeypatch.setattr(source.records, "window", 10)
    monkeypatch.setattr(source.records, "threads", 2)
    read, kept = [], source.records._group
    monkeypatch.setattr(kept, "_make", lambda key: read.append(key) or source.records._read_group(key))
    some = take(source, len(source) // 8 - 8)  # what is read ahead is of the same epoch
    assert len(set(numbers_of(some))) == len(some) * 8
    assert len(read) == len(set(read)) > 60
    assert len(kept._found) == kept.most == 2 * 10 + 2 + 24 // 6


def test_row_groups_that_are_expected_are_there_when_they_are_wanted(server, tmp_path):
    server.files = parquet_shards()
    source = load_source(config_of("parquet", server.url(""), tmp_path))
    source.records.expect(np.array([0, 1, len(source) - 1]))
    source.records._ahead.shutdown(wait=True)
    server.asked.clear()
    image, captions = source[0]
    assert [f"number {number_of(image)}"] == captions
    assert server.asked == []
    source[len(source) // 2]
    assert len(server.asked) > 0


def test_what_is_asked_for_at_once_is_made_once():
    made, gate = [], threading.Event()

    def make(key):
        made.append(key)
        gate.wait(5)
        if key == "bad":
            raise Lost("gone")
        return key * 2

    kept = Kept(make, 2)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(kept("a"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join()
    assert (made, answers) == (["a"], ["aa"] * 8)
    for _ in range(2):
        with pytest.raises(Lost):
            kept("bad")
    for key in ("b", "a", "c", "a", "b"):
        kept(key)
    assert made == ["a", "bad", "bad", "b", "c", "b"]


def test_a_share_of_pictures_is_held_out():
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2**64, 200_000, np.uint64)
    assert sum(part.sum() for part in _held_out(keys, [80_000, 120_000])) == 4096
    assert [int(part.sum()) for part in _held_out(keys[:2000], [2000])] == [100]
    assert [int(part.sum()) for part in _held_out(keys[:2], [1, 1])] in ([1, 0], [0, 1])
    assert [int(part.sum()) for part in _held_out(keys[:1], [1])] == [0]
    groups = np.repeat(keys[:400], 100)
    held = _held_out(groups, [40_000])[0]
    assert 2000 <= held.sum() <= 2099
    assert all(len(set(held[k : k + 100])) == 1 for k in range(0, 40_000, 100))
    few = _held_out(np.repeat(keys[:3], 100), [300])[0]
    assert few.sum() == 15


@KINDS
def test_ten_million_pictures_take_little_memory(kind):
    """Rows and the ends of captions, each page of which is mapped in the worst case; order needs row groups alone."""
    form = {"tar": tar.FORMAT, "parquet": parquet.FORMAT}[kind]
    size = 10_000_000 * (form.dtype.itemsize + np.dtype(np.int64).itemsize)
    if kind == "parquet":
        order = WindowShuffle(np.arange(0, 10_000_001, 100), 26, 0, 256)
        order[5_000_000]
        size += sum(part.nbytes for part in order._epoch(0))
    assert size <= 400e6
