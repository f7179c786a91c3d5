"""What a training step takes, before it is run: memory, FLOPs, bytes sent, time, MFU, the largest batch.

    python -m jaxgen.parallel.plan --config=configs/scenes.py [--config.SECTION.FIELD=VALUE ...] [--measure=STEPS]
    python -m jaxgen.parallel.plan --config=configs/coco_dit_xl_tpu.py --topology=v5e:4x4,v5e:16x16 [--slices=2] [--json=FILE]

The step is compiled as train.py compiles it, for TPU slices (--topology) without a TPU, else for this machine, whose speed is
measured in a second or two on products of the step's own shapes. Exit status 1: it does not fit, and the line says how to."""

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgen import config as configs
from jaxgen.errors import UserError, cli
from jaxgen.parallel import hlo, probe, runtime
from jaxgen.parallel.devices import TOPOLOGIES, Device, known
from jaxgen.parallel.memory import bytes_a_device, compile_checked
from jaxgen.parallel.mesh import batch_sharding, check_batch, make_mesh, param_shardings, replicated

# Shares of the published peaks that large products, copies and collectives are taken to reach on devices that are not at hand:
# an assumption, in keeping with what others report of dense transformers on TPUs.
REACHED = 0.8
LOOKS = 5  # at the speed of a device that is at hand


class Seconds(NamedTuple):
    """Of a step on one device. The collectives beside computation hide behind it as far as it lasts."""

    compute: float
    beside: float  # copies and collectives that run beside it
    exposed: float  # collectives that nothing runs beside

    @property
    def step(self) -> float:
        return max(self.compute, self.beside) + self.exposed


@dataclasses.dataclass(frozen=True)
class Plan:
    """memory: bytes a device, of which `state` stays from step to step and `limit` is there. flops: of the model, a step.
    executed: FLOPs of one device's products, with what is computed again. peak: FLOP/s a device."""

    where: str
    mesh: dict[str, int]
    dtype: str
    batch: int
    accumulate: int
    parameters: int
    memory: float
    state: float
    limit: float | None
    flops: float
    executed: float
    moved: float
    collectives: list[dict[str, Any]]
    seconds: Seconds
    peak: float | None
    largest: int | None = None
    measured: float | None = None

    @property
    def fits(self) -> bool:
        return self.limit is None or self.memory <= self.limit

    @property
    def mfu(self) -> float | None:
        return self.flops / (self.seconds.step * self.peak * math.prod(self.mesh.values())) if self.peak else None

    def lines(self) -> list[str]:
        gib, s = 2**30, self.seconds
        axes = " × ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        shares = self.mesh["data"] * self.mesh["fsdp"] * self.accumulate
        out = [
            f"{self.where}, {axes}",
            f"  step        {self.parameters / 1e6:.1f} million parameters, {self.dtype}, batch {self.batch}: "
            f"{self.batch // shares} a device{f' in each of {self.accumulate} micro-batches' if self.accumulate > 1 else ''}",
            f"  memory      {self.memory / gib:.2f} GiB a device"
            + (f" of {self.limit / gib:.2f}" if self.limit else "")
            + f", {self.state / gib:.2f} of it state",
            f"  FLOPs       {self.flops:.3g} a step; a device computes {self.executed:.3g} and moves {self.moved / 1e9:.3g} GB",
        ]
        for c in self.collectives:
            out.append(
                f"  {c['kind']:18} {c['axes']:12} {c['times']:6.0f} × , {c['bytes'] / 1e6:10.1f} MB sent a device"
                f"{', beside computation' if c['ahead'] else ''}"
            )
        strange = [f"{c['origin']} ({c['bytes'] / 1e6:.1f} MB)" for c in self.collectives if "all-to-all" in c["kind"]]
        out.append(f"  all-to-all  {'; '.join(strange) or 'none'}")
        out.append(
            f"  time        {s.step * 1e3:.1f} ms a step: computing {s.compute * 1e3:.1f}, beside it {s.beside * 1e3:.1f}, "
            f"waiting for collectives {s.exposed * 1e3:.1f}"
            + (f"; MFU {self.mfu:.1%}" if self.mfu is not None else f"; {self.flops / s.step / 1e9:.0f} GFLOP/s")
        )
        if self.measured is not None:
            off = s.step / self.measured - 1
            out.append(f"  measured    {self.measured * 1e3:.1f} ms a step; the prediction is off by {off:+.0%}")
        if self.largest is not None:
            out.append(f"  largest     batch {self.largest} fits")
        elif self.limit is not None:
            more = int((self.limit - self.state) / (self.memory - self.state) * self.batch) // shares * shares
            out.append(f"  largest     batch {more} or more should fit (--largest compiles it)")
        return out


def predict(work: list[hlo.Work], collectives: list[hlo.Collective], speed: Any, across: Callable[[Any], bool]) -> Seconds:
    """speed: has product, copy, elements, send -> seconds. across: whether a collective leaves the slice."""
    together = sum if speed.in_turn else max  # whether products and what is done one by one share their units
    each = (
        together((sum(map(speed.product, w.products)), max(speed.copy(w.bytes), speed.elements(w.elements)))) * w.times
        for w in work
        if not w.ahead
    )
    sending = [(c.ahead, speed.send(c, across(c)) * c.times) for c in collectives]
    copies = speed.copy(sum(w.bytes * w.times for w in work))
    beside = max(copies if any(w.ahead for w in work) else 0.0, sum(t for ahead, t in sending if ahead))
    return Seconds(sum(each), beside, sum(t for ahead, t in sending if not ahead))


class Published:
    """Speeds of a device that is not at hand."""

    in_turn = False

    def __init__(self, device: Device):
        self._device = device

    def product(self, p: hlo.Product) -> float:
        tile = self._device.tile
        return p.flops * (-(-p.k // tile) * tile / p.k) / (self._device.flops * REACHED)

    def copy(self, count: float) -> float:
        return count / (self._device.bandwidth * REACHED)

    def elements(self, count: float) -> float:
        return 0.0  # published nowhere; hardly ever above what it takes to bring them

    def send(self, c: hlo.Collective, across: bool) -> float:
        d = self._device
        ring = d.links if len(c.devices) >= d.ring and c.kind != "collective-permute" else 1
        return c.bytes / (d.network if across else d.link * ring * REACHED)


class Abstract(NamedTuple):
    """A step with abstract arguments."""

    step: Any
    state: Any
    frozen: Any
    batch: Any
    make: Callable[[Any], Any]
    flops: float  # of the model, a step


def abstract(config: Any, mesh: Mesh, encoder: Any, dtype: Any, tokens: int) -> Abstract:
    """What train.py compiles of a configuration whose family is resolved; no data are read. tokens: a caption's."""
    from jaxgen.text.features import TextFeatures
    from jaxgen.train import loop

    platform = mesh.devices.flat[0].platform
    inside = loop.encodes_in_step(config, platform)
    step, make, state, shapes = loop.assemble(config, mesh, encoder, inside, dtype)
    rows, place = config.train.batch_size, batch_sharding(mesh)
    here = lambda tree, s: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree)  # noqa: E731
    spec = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=place)  # noqa: E731
    frozen = here(jax.eval_shape(lambda: config.family.init_frozen(shapes)), replicated(mesh))
    batch: dict[str, Any] = {"image": spec(*shapes.image, dtype=jnp.uint8)}
    if loop.precomputes(config, platform, bool(config.data.crop) or config.data.max_aspect_ratio > 1):
        made = jax.eval_shape(lambda f, x: config.family.precompute(f, loop.to_float(x)), frozen, batch["image"])
        kept = lambda x: jnp.float16 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype  # noqa: E731
        batch = {name: spec(*x.shape[1:], dtype=kept(x)) for name, x in made.items()} or batch
    if inside:
        batch |= {name: spec(tokens, dtype=jnp.int32) for name in ("input_ids", "attention_mask")}
        frozen |= {"text": jax.tree.map(here, encoder.params, laid(encoder, mesh))}
    else:
        batch["text"] = TextFeatures(spec(tokens, shapes.hidden), spec(shapes.pooled), spec(tokens, dtype=jnp.bool_))  # ty: ignore
    return Abstract(step, state, frozen, batch, make, config.family.train_flops(shapes, tokens) * rows)


def laid(encoder: Any, mesh: Mesh) -> Any:
    """Where each of a text encoder's parameters lies when it is read for this mesh."""
    if encoder.pretrained is None:  # encoders side by side: what each one's own are is not told
        return jax.tree.map(lambda _: replicated(mesh), encoder.params)
    from jaxgen.nn.module import logical_axes

    return param_shardings(mesh, logical_axes(encoder.pretrained.architecture.build), encoder.params)


def plan(config: Any, mesh: Mesh, encoder: Any, tokens: int, where: str, *, chip: Device | None = None, steps: int = 0) -> Plan:
    """The plan of a configuration on a mesh, by the published figures of `chip` or, without one, as measured on this machine.

    steps: how many to run for comparison, on made-up data. Raises UserError where it does not fit."""
    from jaxgen.train.fit import jitted

    config = dataclasses.replace(config, family=config.family.resolve())
    check_batch(config.train.batch_size, mesh, config.train.accumulate)
    auto = chip is not None and config.train.compute_dtype == "auto"
    dtype = jnp.dtype(jnp.bfloat16 if auto else runtime.compute_dtype(config.train.compute_dtype))
    parts = abstract(config, mesh, encoder, dtype, tokens)
    placed = jax.tree.map(lambda leaf: leaf.sharding, parts.state)
    traced = jitted(parts.step, placed).trace(parts.state, parts.frozen, parts.batch)
    lowered = traced.lower(lowering_platforms=(mesh.devices.flat[0].platform,))
    held = bytes_a_device((parts.state, parts.frozen))
    checked = compile_checked(lowered, config, mesh, held, chip and chip.memory)
    compiled = checked.program
    work, collectives = hlo.read(compiled.as_text())
    home = [getattr(device, "slice_index", None) for device in mesh.devices.flat]
    across = lambda c: len({home[i] for i in c.devices}) > 1  # noqa: E731
    speed, measured = Published(chip) if chip is not None else probe.Measured(work, collectives), None
    if isinstance(speed, probe.Measured):
        measured = look(speed, stepper(compiled, parts, placed, encoder) if steps else None, steps)
    facts = chip or known(mesh.devices.flat[0].device_kind)
    return Plan(
        where=where,
        mesh=dict(mesh.shape),
        dtype=dtype.name,
        batch=config.train.batch_size,
        accumulate=config.train.accumulate,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(parts.state.params)),
        memory=checked.memory,
        state=checked.given,
        limit=checked.limit,
        flops=parts.flops,
        executed=probe.flops_of(work),
        moved=sum(w.bytes * w.times for w in work),
        collectives=grouped(collectives, mesh),
        seconds=predict(work, collectives, speed, across),
        peak=facts and facts.flops,
        measured=measured,
    )


def grouped(collectives: list[hlo.Collective], mesh: Mesh) -> list[dict[str, Any]]:
    """The collectives of a kind over the same mesh axes in one row, the most bytes first."""
    places = list(np.ndindex(*mesh.devices.shape))
    rows: dict[tuple, dict[str, Any]] = {}
    for c in collectives:
        spans = [axis for d, axis in enumerate(mesh.axis_names) if len({places[i][d] for i in c.devices}) > 1]
        key = (c.kind, "×".join(map(str, spans)), c.ahead)
        row = rows.setdefault(
            key, {"kind": c.kind, "axes": key[1], "ahead": c.ahead, "times": 0.0, "bytes": 0.0, "origin": c.origin}
        )
        row["times"] += c.times
        row["bytes"] += c.bytes * c.times
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def look(speed: probe.Measured, step: Callable[[], Any] | None, steps: int) -> float | None:
    """Measures this machine's speed and, in turn with it, `steps` steps, so that both see a machine whose speed wanders alike.

    Seconds a step takes, the median after a first one."""
    took = []
    for turn in range(max(LOOKS, steps + 1)):
        speed.look()
        if step is not None and turn <= steps:
            began = time.perf_counter()
            step()
            took.append(time.perf_counter() - began)
    return statistics.median(took[1:]) if took else None


def stepper(compiled: Any, parts: Abstract, placed: Any, encoder: Any) -> Callable[[], dict[str, jax.Array]]:
    """Each call takes the next step of a new state, on made-up data, and returns its metrics when all of it is done."""
    fill = lambda x: jax.device_put(np.ones(x.shape, x.dtype), x.sharding)  # noqa: E731
    state, batch = jax.jit(parts.make, out_shardings=placed)(encoder.params), jax.tree.map(fill, parts.batch)
    frozen = jax.tree.map(fill, {name: tree for name, tree in parts.frozen.items() if name != "text"})
    frozen |= {"text": encoder.params} if "text" in parts.frozen else {}

    def step() -> dict[str, jax.Array]:
        nonlocal state
        state, metrics = jax.block_until_ready(compiled(state, frozen, batch))
        return metrics

    return step


def largest(config: Any, again: Callable[[Any], Plan], first: Plan, least: int) -> int | None:
    """The largest batch that fits, in multiples of `least`: memory is a line in the batch, drawn through two compiled steps
    and then tried."""
    if first.limit is None:
        return None
    of = lambda batch: dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch))  # noqa: E731
    other = max(first.batch // 2 // least, 1) * least
    if other == first.batch:
        other = 2 * least
    second = again(of(other))
    slope = (first.memory - second.memory) / (first.batch - second.batch)
    if slope <= 0:
        return None
    batch = int((first.limit - first.memory) / slope + first.batch) // least * least
    while batch > first.batch:
        try:
            again(of(batch))
            return batch
        except UserError:
            batch = int(batch * 0.95) // least * least
    return first.batch


def topology(name: str, slices: int) -> list[Any]:
    """The chips of TPU slices that need not exist. Raises UserError."""
    runtime.require(("libtpu",), "tpu")
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=slices).devices)
    except Exception as error:
        said = str(error).splitlines()[0]
        raise UserError(f"--topology={name}: {said}; known are {', '.join(TOPOLOGIES)}") from None


def main() -> None:
    path, overrides, rest = configs.split_arguments(sys.argv[1:])
    parser = argparse.ArgumentParser("jaxgen.parallel.plan", None, __doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--topology", help="TPU slices, by commas (v5e:4x4,v6e:16x16); without it, this machine")
    parser.add_argument("--slices", type=int, default=1, help="how many of them, joined by the data-centre network")
    parser.add_argument("--tokens", type=int, default=64, help="of a caption, to which all are padded")
    parser.add_argument("--measure", type=int, default=0, metavar="STEPS", help="run so many here, beside the prediction")
    parser.add_argument("--largest", action="store_true", help="find the largest batch that fits (compiles twice more)")
    parser.add_argument("--json", help="write the numbers there")
    args = parser.parse_args(rest)
    config = configs.load(path or "configs/quickstart.py", overrides)
    if not hasattr(config, "family"):
        raise UserError(f"--config={path}: plans are made for what draws pictures, and this is another kind of run")
    if args.topology and args.measure:
        raise UserError("--measure runs steps on this machine: leave --topology out")
    names = args.topology.split(",") if args.topology else [""]
    if args.topology:
        # No TPU is to be looked for, and another process may hold the library.
        os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    else:
        runtime.start(allow_cpu=True)
    found, failed = [], []
    for name in names:
        devices = topology(name, args.slices) if name else jax.devices()
        chip = known(devices[0].device_kind) if name else None
        if name and chip is None:
            raise UserError(f"--topology={name}: nothing is known of the speed of {devices[0].device_kind}")
        mesh = make_mesh(config.mesh, devices)
        encoder = config.text.load(None if name else mesh)
        where = (
            f"{name or devices[0].device_kind}{f' × {args.slices} slices' if args.slices > 1 else ''}: {len(devices)} devices"
        )
        tokens = min(args.tokens, encoder.lengths[-1])
        again = lambda c, m=mesh, e=encoder, t=tokens, w=where, d=chip: plan(c, m, e, t, w, chip=d)  # noqa: E731
        try:
            made = plan(config, mesh, encoder, tokens, where, chip=chip, steps=args.measure)
            if args.largest:
                least = mesh.shape["data"] * mesh.shape["fsdp"] * config.train.accumulate
                made = dataclasses.replace(made, largest=largest(config, again, made, least))
        except UserError as error:
            failed.append(f"{where}: {error}")
            continue
        found.append(made)
        print("\n".join(made.lines()), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps([dataclasses.asdict(p) | {"mfu": p.mfu, "step": p.seconds.step} for p in found]))
    if failed:
        print("\n".join(f"error: {line}" for line in failed), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    cli(main)()
