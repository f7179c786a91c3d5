"""How a training step's time grows with width, depth, tokens and batch, and what more devices cost where none is added.

    python benchmarks/scaling.py [--sweeps=width,depth,tokens,batch,devices] [--rounds=5] [--seconds=2] [--json=FILE]
        [--plot=scaling.png]

Around one transformer of a flow (width 128, depth 4, 8 x 8 patches, batch 32) one thing is changed at a time. A step is the one
train.py runs, optimizer and average included, on made-up data. The exponent p is that of time ~ x^p, a line through the
logarithms; beside it the FLOPs' own. `devices` splits the same batch over 1 to 8 virtual devices of the same processor, along
"data" and along "fsdp": every one of them would take as long as one device if splitting cost nothing, and the overhead is what
it costs; the bytes are what each device sends to the others in a step.

Points of a sweep are timed in turns, a round each; told are medians. --plot asks for matplotlib:
`uv run --with matplotlib python benchmarks/scaling.py --plot=scaling.png`."""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from workers import ROOT, Work, Worker, environment, median, race, serve

sys.path.insert(0, str(ROOT))
TOKENS = 16  # of a caption
PATCH = 4  # pixels along each side of a token


class Point(NamedTuple):
    width: int = 128
    depth: int = 4
    size: int = 32  # pixels along each side
    batch: int = 32
    data: int = 1
    fsdp: int = 1

    @property
    def tokens(self) -> int:
        return (self.size // PATCH) ** 2 + TOKENS

    @property
    def devices(self) -> int:
        return self.data * self.fsdp


BASE = Point()
SPLIT = BASE._replace(batch=64)
# By what is on the axis.
SWEEPS = {
    "width": [BASE._replace(width=w) for w in (64, 128, 256, 512)],
    "depth": [BASE._replace(depth=d) for d in (2, 4, 8, 16)],
    "tokens": [BASE._replace(size=s) for s in (16, 32, 48, 64)],
    "batch": [BASE._replace(batch=b) for b in (8, 16, 32, 64, 128)],
    "devices": [SPLIT, *(SPLIT._replace(**{axis: n}) for axis in ("data", "fsdp") for n in (2, 4, 8))],
}


class Side:
    """A process with as many devices as its points have."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}

    def step(self, variant: str, point: list[int]) -> Work:
        """run: one step; show: its loss."""
        import jax
        import jax.numpy as jnp

        from jaxgen.data.config import DataConfig
        from jaxgen.families.flow import Flow
        from jaxgen.families.transformer import Transformer
        from jaxgen.parallel import hlo, plan
        from jaxgen.parallel.mesh import MeshConfig, make_mesh
        from jaxgen.train import fit
        from jaxgen.train.config import OptimizerConfig, RunConfig, TrainConfig

        p = Point(*point)
        config = RunConfig(
            family=Flow(network=Transformer(width=p.width, depth=p.depth, head_dim=32, patch=PATCH)),
            data=DataConfig(name="scenes", image_size=p.size),
            train=TrainConfig(batch_size=p.batch),
            optimizer=OptimizerConfig(name="adamw"),
        )
        mesh, encoder = make_mesh(MeshConfig(p.data, p.fsdp, 1), jax.devices()[: p.devices]), config.text.load()
        parts = plan.abstract(config, mesh, encoder, jnp.float32, TOKENS)
        where = jax.tree.map(lambda leaf: leaf.sharding, parts.state)
        compiled = fit.jitted(parts.step, where).lower(parts.state, parts.frozen, parts.batch).compile()
        _, collectives = hlo.read(compiled.as_text())
        self.facts[variant] = {
            "flops": parts.flops,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(parts.state.params)),
            "sent": sum(c.bytes * c.times for c in collectives),
            "hardware": jax.devices()[0].device_kind,
        }
        return plan.stepper(compiled, parts, where, encoder), lambda metrics: np.asarray(metrics["loss"])

    def told(self) -> dict[str, Any]:
        return self.facts


def measure(points: list[Point], sides: dict[int, Worker], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """A row a point."""
    for point in points:
        sides[point.devices].ask(do="prepare", kind="step", variant=str(point), point=list(point))
    # A round is every point once.
    times = race(lambda point: sides[point.devices], tuple(points), rounds * len(points), seconds)
    facts = {name: fact for side in sides.values() for name, fact in side.ask(do="told").items()}
    return [
        point._asdict()
        | {"tokens": point.tokens, "devices": point.devices, "seconds": median(times[point]), "all": times[point]}
        | facts[str(point)]
        for point in points
    ]


def exponent(x: list[float], y: list[float]) -> float:
    """p of the y ~ x^p that fits best."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def split(row: dict[str, Any]) -> str:
    return f"{'fsdp' if row['fsdp'] > 1 else 'data'}={row['devices']}"


def tell(axis: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Prints a sweep; returns its exponents, of `devices` the overheads."""
    first = rows[0]["seconds"]
    print(
        f"\n{axis:>10s}{'ms':>10s}{'GFLOP/s':>10s}{'parameters':>13s}"
        + (f"{'overhead':>10s}{'MB sent':>10s}" if axis == "devices" else "")
    )
    for row in rows:
        label = split(row) if axis == "devices" else str(row[axis])
        line = f"{label:>10s}{row['seconds'] * 1e3:10.1f}{row['flops'] / row['seconds'] / 1e9:10.1f}{row['parameters']:13,d}"
        print(line + (f"{row['seconds'] / first - 1:10.0%}{row['sent'] / 1e6:10.1f}" if axis == "devices" else ""), flush=True)
    if axis == "devices":
        return {split(row): row["seconds"] / first - 1 for row in rows[1:]}
    x = [row[axis] for row in rows]
    found = {"time": exponent(x, [r["seconds"] for r in rows]), "flops": exponent(x, [r["flops"] for r in rows])}
    print(f"time ~ {axis}^{found['time']:.2f}, FLOPs ~ {axis}^{found['flops']:.2f}", flush=True)
    return found


def plot(file: str, sweeps: dict[str, Any]) -> None:
    """A panel a sweep, both axes logarithmic."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(sweeps), figsize=(3.2 * len(sweeps), 3.2), squeeze=False, layout="constrained")
    for (axis, found), panel in zip(sweeps.items(), panels[0], strict=True):
        rows = found["rows"]
        if axis == "devices":
            for kind in ("data", "fsdp"):
                own = [rows[0], *(row for row in rows if row[kind] > 1)]
                panel.plot([row["devices"] for row in own], [row["seconds"] * 1e3 for row in own], "o-", label=kind)
            panel.legend(title="split along")
        else:
            x = np.array([row[axis] for row in rows], float)
            panel.plot(x, [row["seconds"] * 1e3 for row in rows], "o-", label=f"time, exponent {found['told']['time']:.2f}")
            flops = np.array([row["flops"] for row in rows])
            panel.plot(x, flops / flops[0] * rows[0]["seconds"] * 1e3, "k:", label=f"FLOPs, {found['told']['flops']:.2f}")
            panel.legend()
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms a step")
        panel.set_xticks([row[axis] for row in rows], [str(row[axis]) for row in rows], minor=False)
        panel.minorticks_off()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--sweeps", default=",".join(SWEEPS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="a point's, in a round")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--plot", help="draw them into this file")
    arguments = parser.parse_args()
    if arguments.worker:
        from jaxgen.parallel import runtime

        runtime.start(allow_cpu=True)
        return serve(Side())
    chosen = arguments.sweeps.split(",")
    if unknown := set(chosen) - SWEEPS.keys():
        parser.error(f"--sweeps={','.join(sorted(unknown))}: known are {', '.join(SWEEPS)}")
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot asks for matplotlib: uv run --with matplotlib python benchmarks/scaling.py --plot=FILE")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="jaxgen-scaling-") as scratch:
        place = Path(scratch)
        for axis in chosen:
            points, sides = SWEEPS[axis], {}
            for devices in sorted({point.devices for point in points}):
                own = environment(place)
                if axis == "devices":
                    own |= {"JAX_PLATFORMS": "cpu", "JAXGEN_CPU_DEVICES": str(devices)}
                command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
                sides[devices] = Worker(command, own, place / f"{devices}.txt")
            rows = measure(points, sides, arguments.rounds, arguments.seconds)
            for side in sides.values():
                side.end()
            if not found:
                print(f"{rows[0]['hardware']}, {len(os.sched_getaffinity(0))} cores, float32; medians of {arguments.rounds}")
            found[axis] = {"rows": rows, "told": tell(axis, rows)}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"settings": vars(arguments), "sweeps": found}, indent=2) + "\n")
    if arguments.plot:
        plot(arguments.plot, found)


if __name__ == "__main__":
    main()
