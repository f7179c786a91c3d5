"""Pictures a second that a host gets out of shards behind a slow line: ours from tar and parquet, and WebDataset's from tar.

    python benchmarks/input_pipeline.py [--peer_python=PYTHON] [--pictures=6000] [--repeats=3] [--json=FILE]

Makes JPEGs of 256 × 256 with captions, in tar (as img2dataset writes them) and in parquet (as Hugging Face `datasets` does),
serves them from a process of its own at localhost where every request waits --latency_ms, and reads batches from them: each
reader in a process of its own, in turns, the median of --repeats. `--peer_python` is an interpreter that has webdataset, torch
and OpenCV (a DataLoader of --workers processes); without it the peer is a plain loop over tarfile, one shard after the other.
Peers read shards from end to end and mix within a buffer; ours draws every picture of a tar on its own, from anywhere.

Beside that: what one thread and all cores decode and nothing else (no reader can be quicker), whether a reader that is started
in the middle gives the same batches, whether a bad shard is survived, and the memory that an index of --entries pictures takes.
Exits with status 1 where one of these is not so, where memory passes 400 MB, or where ours gives fewer than --least pictures a
second."""

import argparse
import hashlib
import http.server
import io
import json
import os
import random
import socketserver
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MEMORY = 400e6  # bytes


# The files and their server


def make(place: Path, pictures: int, shards: int, side: int) -> dict[str, Any]:
    """Shards 00000.tar, 00000.parquet and so on, and one of each that is damaged."""
    import cv2
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    grid, total = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1) / side, 0
    for shard in range(shards):
        rows = []
        with tarfile.open(place / f"{shard:05d}.tar", "w") as archive:
            for k in range(shard, pictures, shards):
                # Waves and grain: 25 kB, as LAION-400M's pictures of this size have.
                waves = (
                    np.sin(grid @ rng.normal(0, 25, (2, 3)) + rng.uniform(0, 6, 3)) * 90
                    + 128
                    + rng.normal(0, 8, (side, side, 1))
                )
                data = cv2.imencode(".jpg", waves.clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
                caption = f"waves number {k}"
                said = json.dumps({"caption": caption, "key": f"{k:09d}", "status": "success", "width": side, "height": side})
                for ending, part in (("jpg", data), ("json", said.encode()), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{k:09d}.{ending}")
                    info.size = len(part)
                    archive.addfile(info, io.BytesIO(part))
                rows.append({"image": {"bytes": data, "path": None}, "caption": caption})
                total += len(data)
        pq.write_table(pa.Table.from_pylist(rows), place / f"{shard:05d}.parquet", row_group_size=100)
    for ending in ("tar", "parquet"):
        whole = (place / f"00000.{ending}").read_bytes()
        (place / f"{shards:05d}.{ending}").write_bytes(whole[: len(whole) * 2 // 3 + 100])
    return {"pictures": pictures, "shards": shards, "side": side, "bytes_a_picture": round(total / pictures)}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    place, latency = Path(), 0.0

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        time.sleep(self.latency)
        try:
            file = os.open(self.place / self.path.strip("/"), os.O_RDONLY)
        except OSError:
            return self.send_error(404)
        try:
            size = os.fstat(file).st_size
            start, end = 0, size - 1
            if asked := self.headers["Range"]:
                first, last = asked.removeprefix("bytes=").split("-")
                start, end = int(first), min(int(last or size - 1), size - 1)
            self.wfile.write(
                f"HTTP/1.1 {206 if asked else 200} OK\r\nContent-Length: {end - start + 1}\r\n"
                f"Content-Range: bytes {start}-{end}/{size}\r\n\r\n".encode()
            )
            self.wfile.flush()
            while start <= end:
                start += os.sendfile(self.connection.fileno(), file, start, end - start + 1)
        finally:
            os.close(file)


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads, allow_reuse_address, request_queue_size = True, True, 512

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # readers that hang up


def serve(place: Path, latency_ms: float) -> None:
    Handler.place, Handler.latency = place, latency_ms / 1000
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


# The readers, each in a process of its own


def ours(kind: str, url: str, place: Path, made: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Also whether the middle of the run can be had again and what the bad shard came to."""
    sys.path.insert(0, str(ROOT))
    from itertools import islice

    import grain  # noqa: F401 (not to be timed)

    from jaxgen.data.config import DataConfig
    from jaxgen.data.pipeline import batches, load_source

    batch_size = 64
    # The window holds a fifth of the set, so that parquet's row groups are read anew in each epoch as a large set's are.
    window = max(1, made["pictures"] * made["bytes_a_picture"] // 5 // 2**20)
    config = DataConfig(
        name=f"{kind}:{url}{{00000..{made['shards']:05d}}}.{kind}",
        image_size=made["side"],
        dir=str(place),
        keep_in_memory=0,
        window=window,
    )
    began = time.monotonic()
    source = load_source(config)
    indexing = time.monotonic() - began
    digests: list[str] = []
    feed: Any = batches(source, seed=0, batch_size=batch_size)  # a generator

    def counts() -> Any:
        for batch in feed:
            if len(digests) < 6:
                digests.append(hashlib.sha256(batch["image"].tobytes() + repr(batch["caption"]).encode()).hexdigest())
            yield batch_size

    measured = timed(counts(), seconds)
    feed.close()
    again = islice(batches(source, seed=0, batch_size=batch_size, start_step=3), 3)
    repeated = [hashlib.sha256(b["image"].tobytes() + repr(b["caption"]).encode()).hexdigest() for b in again]
    lost = list(source.shards.losses.why) if source.shards is not None else []
    return measured | {
        "index_s": indexing,
        "resumed": repeated == digests[3:6],
        "bad_shard_survived": lost == [f"{url}{made['shards']:05d}.{kind}"],
    }


def webdataset(_: str, url: str, place: Path, made: dict[str, Any], seconds: float, workers: int) -> dict[str, Any]:
    import cv2
    import numpy as np
    import torch
    import webdataset as wds

    cv2.setNumThreads(0)

    def image(data: bytes) -> Any:
        found: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        return cv2.cvtColor(found, cv2.COLOR_BGR2RGB)

    shards = f"pipe:curl -s {url}{{00000..{made['shards'] - 1:05d}}}.tar"
    data = wds.WebDataset(shards, resampled=True, shardshuffle=False, handler=wds.warn_and_continue).shuffle(1000)
    data = data.to_tuple("jpg", "txt").map_tuple(image, bytes.decode)
    loader = torch.utils.data.DataLoader(data.batched(64), batch_size=None, num_workers=workers)
    return timed(((len(captions) for _, captions in loader)), seconds)


def plain(_: str, url: str, place: Path, made: dict[str, Any], seconds: float) -> dict[str, Any]:
    import urllib.request

    import cv2
    import numpy as np

    def counts() -> Any:
        while True:
            for shard in random.sample(range(made["shards"]), made["shards"]):
                with urllib.request.urlopen(f"{url}{shard:05d}.tar") as file, tarfile.open(fileobj=file, mode="r|") as archive:
                    for member in archive:
                        data: Any = archive.extractfile(member)
                        if member.name.endswith(".jpg"):
                            image: Any = cv2.imdecode(np.frombuffer(data.read(), np.uint8), cv2.IMREAD_COLOR)
                            cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
                            yield 1

    return timed(counts(), seconds)


def timed(counts: Any, seconds: float) -> dict[str, Any]:
    """Over so many seconds from the first batch on; also what a picture takes of the processors, which other work on the host
    moves less than the rate."""
    began = time.monotonic()
    next(counts)
    first = time.monotonic() - began
    total, began, spent = 0, time.monotonic(), processor_seconds()
    while time.monotonic() - began < seconds:
        total += next(counts)
    passed = time.monotonic() - began
    return {
        "images_per_sec": total / passed,
        "first_batch_s": first,
        "processor_ms": (processor_seconds() - spent) / total * 1000,
    }


def processor_seconds() -> float:
    """Of this process and all that it has started."""
    parents, spent = {}, {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            told = (directory / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        parents[int(directory.name)], spent[int(directory.name)] = int(told[1]), sum(map(int, told[11:15]))

    def is_ours(process: int) -> bool:
        while process and process != os.getpid():
            process = parents.get(process, 0)
        return bool(process)

    return sum(ticks for process, ticks in spent.items() if is_ours(process)) / os.sysconf("SC_CLK_TCK")


def decoding(place: Path, seconds: float) -> dict[str, float]:
    """Pictures a second that are decoded from memory, with one thread and with one a core."""
    import cv2
    import numpy as np

    cv2.setNumThreads(0)
    with tarfile.open(place / "00000.tar") as archive:
        names = [name for name in archive.getnames() if name.endswith(".jpg")][:100]
        files = [archive.extractfile(name) for name in names]
        data = [np.frombuffer(file.read(), np.uint8) for file in files if file is not None]

    def work(_: int) -> int:
        count, began = 0, time.monotonic()
        while time.monotonic() - began < seconds:
            image: Any = cv2.imdecode(data[count % len(data)], cv2.IMREAD_UNCHANGED)
            cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
            count += 1
        return count

    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as pool:
        return {"one_thread": work(0) / seconds, "all_cores": sum(pool.map(work, range(cores))) / seconds, "cores": cores}


def memory(kind: str, place: Path, entries: int) -> dict[str, float]:
    """Bytes by which a process grows, mapped files included, that opens an index and draws from all of it."""
    sys.path.insert(0, str(ROOT))
    import grain
    import numpy as np

    from jaxgen.data import parquet, tar
    from jaxgen.data.shards import INDEX, Index, ShardSet
    from jaxgen.storage import as_path

    form = {"tar": tar.FORMAT, "parquet": parquet.FORMAT}[kind]
    place.mkdir(parents=True)
    size = 10**6
    with open(place / "train.rows", "wb") as rows, open(place / "train.ends", "wb") as ends:
        for start in range(0, entries, size):
            numbers = np.arange(start, min(start + size, entries))
            part = np.zeros(len(numbers), form.dtype)
            part["shard"] = numbers // 10_000
            if kind == "tar":
                part["offset"], part["length"] = numbers % 10_000 * 30_000, 30_000
            else:
                part["group"], part["row"], part["bytes"] = numbers % 10_000 // 100, numbers % 100, 30_000
            part.tofile(rows)
            ((numbers + 1) * 50).tofile(ends)
    with open(place / "train.captions", "wb") as captions:
        captions.truncate(entries * 50)
    shards = -(-entries // 10_000)
    told = {"splits": {"train": entries}, "problems": {}, "lost": {}, "shards": [f"{k:05d}.{kind}" for k in range(shards)]}
    (place / INDEX).write_text(json.dumps(told | {"sizes": [1] * shards}))
    chosen = ShardSet(form, "")
    grain.MapDataset.range(100).seed(0).shuffle().repeat(None)  # imports, before it is measured
    before = resident()
    records = form.records(chosen, Index(as_path(place), chosen), "train")
    orders: Any = records.orders(0, 256) or [grain.MapDataset.range(len(records)).seed(0).shuffle().repeat(None)]
    longest = last = 0
    for position in range(0, entries, 97):  # every page of the rows and ends, nearly
        entry = orders[0][position]
        longest = max(longest, len(records.captions_of(int(entry))[0]))
        last = max(last, int(records.rows[int(entry)]["shard"]))
    if longest != 50 or last >= shards:
        raise ValueError(f"captions of {longest} bytes")
    return {"bytes": resident() - before, "entries": entries}


def resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


READERS = {
    "ours tar": (ours, "tar"),
    "ours parquet": (ours, "parquet"),
    "webdataset tar": (webdataset, "tar"),
    "plain tar": (plain, "tar"),
}


def child(python: str, *arguments: Any) -> dict[str, Any]:
    """What a step in a process of its own says in its last line."""
    command = [python, str(Path(__file__).resolve()), "--child", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    if done.returncode:
        sys.exit(f"{arguments[0]} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_child(arguments: list[Any]) -> dict[str, Any]:
    name, *rest = arguments
    if name in READERS:
        reader, kind = READERS[name]
        url, place, *others = rest
        return reader(kind, url, Path(place), *others)
    if name == "memory":
        return memory(rest[0], Path(rest[1]), rest[2])
    if name == "make":
        return make(Path(rest[0]), *rest[1:])
    return decoding(Path(rest[0]), rest[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", help="an interpreter with webdataset, torch and OpenCV")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of the peer's DataLoader")
    parser.add_argument("--pictures", type=int, default=6000)
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--latency_ms", type=float, default=50)
    parser.add_argument("--seconds", type=float, default=15, help="a measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--entries", type=int, default=10_000_000, help="of the index whose memory is measured")
    parser.add_argument("--least", type=float, default=600, help="pictures a second that ours has to give")
    parser.add_argument("--dir", type=Path, help="where the shards lie meanwhile (default: the system's temporary directory)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(run_child(json.loads(arguments.child))))
        return
    if arguments.serve:
        return serve(Path(arguments.serve), arguments.latency_ms)

    peer = "webdataset tar" if arguments.peer_python else "plain tar"
    names = ["ours tar", "ours parquet", peer]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="jaxgen-input-", dir=arguments.dir) as scratch:
        place = Path(scratch) / "shards"
        place.mkdir()
        made = child(sys.executable, "make", str(place), arguments.pictures, arguments.shards, arguments.side)
        print(f"{made['pictures']} pictures of {made['bytes_a_picture']} bytes in {made['shards']} shards", flush=True)
        memories = {
            kind: child(sys.executable, "memory", kind, f"{scratch}/{kind}", arguments.entries) for kind in ("tar", "parquet")
        }
        command = [sys.executable, str(Path(__file__).resolve()), f"--serve={place}", f"--latency_ms={arguments.latency_ms}"]
        server: Any = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            url = f"http://127.0.0.1:{int(server.stdout.readline())}/"
            decoded = []
            for repeat in range(arguments.repeats):
                decoded.append(child(sys.executable, "decoding", str(place), 3.0))
                for name in names:
                    python = arguments.peer_python if name == "webdataset tar" else sys.executable
                    extra = [arguments.workers] if name == "webdataset tar" else []
                    # Each time into a new directory, so that the index is written anew.
                    runs[name].append(child(python, name, url, f"{scratch}/{name}{repeat}", made, arguments.seconds, *extra))
                    print(
                        f"{repeat + 1}/{arguments.repeats} {name}: {runs[name][-1]['images_per_sec']:.0f} images/s", flush=True
                    )
        finally:
            server.terminate()
            server.wait()

    middle = {name: {k: statistics.median(r[k] for r in some) for k in some[0]} for name, some in runs.items()}
    rates = {name: sorted(run["images_per_sec"] for run in some) for name, some in runs.items()}
    bare = {name: statistics.median(d[name] for d in decoded) for name in decoded[0]}
    heads = ("images/s", "lowest", "highest", "processor ms", "first batch s", "index s")
    print(f"\n{'reader':16s}" + "".join(f"{head:>14s}" for head in heads))
    for name in names:
        row = middle[name]
        figures = [row["images_per_sec"], rates[name][0], rates[name][-1], row["processor_ms"], row["first_batch_s"]]
        told = [f"{value:14.{digits}f}" for value, digits in zip(figures, (0, 0, 0, 2, 2), strict=True)]
        print(f"{name:16s}" + "".join(told) + (f"{row['index_s']:14.1f}" if "index_s" in row else f"{'-':>14s}"))
    print(
        f"decoding alone: {bare['one_thread']:.0f} images/s with one thread, {bare['all_cores']:.0f} with {bare['cores']:.0f}"
    )
    for kind, row in memories.items():
        print(f"an index of {row['entries']:,} pictures in {kind}: {row['bytes'] / 1e6:.0f} MB")
    checks = {
        f"{name}: {what}": all(run[what] for run in runs[name])
        for name in names[:2]
        for what in ("resumed", "bad_shard_survived")
    }
    checks |= {
        f"{name}: at least {arguments.least:g} images/s": middle[name]["images_per_sec"] >= arguments.least
        for name in names[:2]
    }
    checks |= {f"index of {kind}: at most {MEMORY / 1e6:.0f} MB": row["bytes"] <= MEMORY for kind, row in memories.items()}
    for what, kept in checks.items():
        print(f"{what}: {'kept' if kept else 'FAILED'}")
    report = {"made": made, "latency_ms": arguments.latency_ms, "readers": runs, "median": middle, "decoding": bare}
    if arguments.json:
        arguments.json.write_text(json.dumps(report | {"memory": memories, "checks": checks}, indent=2) + "\n")
    sys.exit(not all(checks.values()))


if __name__ == "__main__":
    main()
