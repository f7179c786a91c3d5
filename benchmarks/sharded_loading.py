"""Memory that loading a sharded language model takes in each process, beside the weights that the process owns.

    python benchmarks/sharded_loading.py [--config=config.json] [--processes=4] [--dir=.] [--json=FILE]

Writes random weights of a configuration (by default Llama 3 8B's layers and vocabulary, a quarter of its layers: 4.5 GB in
bfloat16) in several files into --dir, has `--processes` processes on the CPU load them over a mesh fsdp=processes, and removes
them. Measured is anonymous memory (RssAnon; pages of mapped files are the system's and do not count), from outside and
over a process's whole life, above what it was once JAX had started. Exits with status 1 where the peak is more than --limit
times the bytes that the process owns."""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
LLAMA = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 5e5,
}
DTYPES = {"bfloat16": (ml_dtypes.bfloat16, "BF16"), "float32": (np.float32, "F32")}
CHILD = """
import json, sys, time
from jaxgen.parallel import runtime
from jaxgen.parallel.mesh import MeshConfig, make_mesh
from jaxgen.text.encoder import load_pretrained
import jax

runtime.start(allow_cpu=True)
mesh = make_mesh(MeshConfig(1, int(sys.argv[2]), 1))
anonymous = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
began = time.monotonic()
params = jax.block_until_ready(load_pretrained(sys.argv[1], dtype=sys.argv[3], mesh=mesh).params)
seconds = time.monotonic() - began
shards = [shard.data for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
told = {"baseline": anonymous, "owned": sum(x.nbytes for x in shards), "largest": max(x.nbytes for x in shards)}
print(json.dumps(told | {"seconds": round(seconds, 1)}))
"""


def shapes_of(values: dict[str, Any]) -> dict[str, list[int]]:
    """{tensor's name: shape} as the files of a configuration have them."""
    import jax

    sys.path.insert(0, str(ROOT))
    from jaxgen.nn.module import flatten, init_params
    from jaxgen.text import registry

    architecture = registry.architecture(values, "config.json")
    abstract = dict(flatten(jax.eval_shape(lambda: init_params(architecture.build, jax.random.key(0)))))
    found = {}
    for ours, tensor in architecture.tensors().items():
        *first, last = abstract[ours].shape
        shape = [*first, last * tensor.part[1]]
        found[tensor.name] = shape[::-1] if tensor.transposed else shape
    return found


def write(place: Path, values: dict[str, Any], dtype: str, files: int) -> int:
    """The checkpoint, piece by piece; returns the bytes of its numbers."""
    kind, name = DTYPES[dtype]
    shapes = shapes_of(values)
    sizes = {tensor: int(np.prod(shape)) * np.dtype(kind).itemsize for tensor, shape in shapes.items()}
    total = sum(sizes.values())
    if shutil.disk_usage(place).free < 1.1 * total:
        sys.exit(f"{place} has no room for {total / 1e9:.1f} GB: another --dir")
    parts: list[list[str]] = [[]]
    for tensor in shapes:
        if sum(sizes[t] for t in parts[-1]) > total / files and len(parts) < files:
            parts.append([])
        parts[-1].append(tensor)
    rng = np.random.default_rng(0)
    # Random numbers once, from another start each time they are used.
    numbers = (0.02 * rng.standard_normal(2**22, np.float32)).astype(kind).tobytes()
    index = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        index |= dict.fromkeys(part, file)
        ends = np.cumsum([sizes[tensor] for tensor in part]).tolist()
        entries = {
            tensor: {"dtype": name, "shape": shapes[tensor], "data_offsets": [end - sizes[tensor], end]}
            for tensor, end in zip(part, ends, strict=True)
        }
        header = json.dumps(entries).encode()
        with open(place / file, "wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            for tensor in part:
                left = sizes[tensor]
                while left:
                    start = int(rng.integers(len(numbers) // 8)) * 4
                    piece = memoryview(numbers)[start : start + left]
                    out.write(piece)
                    left -= len(piece)
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    (place / "config.json").write_text(json.dumps(values))
    return total


def anonymous(pid: int) -> int:
    """Bytes of a process's memory that no file backs; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def measure(place: Path, dtype: str, processes: int) -> list[dict[str, Any]]:
    """One row a process: bytes at the baseline, owned, and at the peak above the baseline."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAXGEN_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes)}
    command = [sys.executable, "-c", CHILD, str(place), str(processes), dtype]
    children = [
        subprocess.Popen(command, env=environment | {"JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE, text=True)
        for i in range(processes)
    ]
    peaks = [0] * processes

    def watch() -> None:
        while any(child.poll() is None for child in children):
            for i, child in enumerate(children):
                peaks[i] = max(peaks[i], anonymous(child.pid))
            time.sleep(0.003)

    watcher = threading.Thread(target=watch)
    watcher.start()
    told = [child.communicate()[0] for child in children]
    watcher.join()
    if any(child.returncode for child in children):
        sys.exit("a process failed")
    rows = [json.loads(out.splitlines()[-1]) for out in told]
    for row, peak in zip(rows, peaks, strict=True):
        row |= {"peak": peak - row["baseline"], "ratio": round((peak - row["baseline"]) / row["owned"], 3)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a config.json of any architecture")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the files and of the loaded weights")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--limit", type=float, default=1.3)
    parser.add_argument("--dir", type=Path, help="where the weights lie meanwhile (default: the system's temporary directory)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    values = json.loads(arguments.config.read_text()) if arguments.config else LLAMA
    with tempfile.TemporaryDirectory(prefix="jaxgen-sharded-", dir=arguments.dir) as scratch:
        began = time.monotonic()
        total = write(Path(scratch), values, arguments.dtype, arguments.files)
        print(f"{total / 1e9:.2f} GB written in {time.monotonic() - began:.0f} s", flush=True)
        rows = measure(Path(scratch), arguments.dtype, arguments.processes)

    print(
        f"\n{'process':>7s} {'baseline':>9s} {'owned':>9s} {'peak':>9s} {'beside':>9s} {'peak/owned':>10s} {'seconds':>8s}  MB"
    )
    for i, row in enumerate(rows):
        megabytes = [row["baseline"], row["owned"], row["peak"], row["peak"] - row["owned"]]
        print(f"{i:7d} " + " ".join(f"{n / 1e6:9.0f}" for n in megabytes) + f" {row['ratio']:10.3f} {row['seconds']:8.1f}")
    worst = max(row["ratio"] for row in rows)
    beside = max(row["peak"] - row["owned"] for row in rows)
    owned = 8.03e9 * 2 / arguments.processes
    print(
        f"\nworst {worst:.3f}, limit {arguments.limit:g}: {'FAILED' if worst > arguments.limit else 'kept'}\n"
        f"8.03 billion parameters in bfloat16 over {arguments.processes} processes: 8.03e9 × 2 / {arguments.processes} = "
        f"{owned / 1e9:.2f} GB owned each; the {beside / 1e6:.0f} MB beside do not grow with the layers: "
        f"{(owned + beside) / 1e9:.2f} GB at the peak, {(owned + beside) / owned:.3f} times"
    )
    report = {
        "processes": rows,
        "worst_ratio": worst,
        "bytes": total,
        "dtype": arguments.dtype,
        "config": values,
        "eight_billion": {"owned": owned, "peak": owned + beside, "ratio": round((owned + beside) / owned, 3)},
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({name: report[name] for name in ("worst_ratio", "bytes", "dtype", "eight_billion")}))
    sys.exit(worst > arguments.limit)


if __name__ == "__main__":
    main()
