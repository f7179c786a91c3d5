"""How fast this machine is at what a compiled step consists of, found by running some of it for a second or two."""

import math
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgen.parallel.hlo import Collective, Product, Work

SHARE = 0.9  # of all products' FLOPs whose shapes are timed; the rest goes at their mean speed
MOST = 16  # shapes
BLOCK = 0.02  # seconds that one timing lasts at least


class Measured:
    """Speeds of this process's devices, all of them busy at once as in a step: medians of what the looks have seen, of which
    there has to be one."""

    def __init__(self, work: list[Work], collectives: list[Collective]):
        self.in_turn = jax.default_backend() == "cpu"
        self._timers: dict[Any, Callable[[], float]] = {"byte": per_byte(), "element": per_element()}
        self._timers |= {size: per_sent(size) for size in {len(c.devices) for c in collectives}}
        self._seen: dict[Any, list[float]] = defaultdict(list)
        self._totals: dict[tuple, float] = defaultdict(float)  # FLOPs a step, of the shapes that are timed
        totals: dict[tuple, float] = defaultdict(float)
        self._flops: dict[tuple, float] = {}
        for w in work:
            for p in w.products:
                totals[p.shape] += p.flops * w.times
                self._flops[p.shape] = p.flops
        for shape, total in sorted(totals.items(), key=lambda each: -each[1])[:MOST]:
            if sum(self._totals.values()) >= SHARE * sum(totals.values()):
                break
            made = remake(shape)
            if made is not None:
                self._timers[shape] = timer(*made, guess=self._flops[shape] / 5e10)
                self._totals[shape] = total

    def look(self) -> None:
        """Times each thing once more."""
        for name, took in self._timers.items():
            self._seen[name].append(took())

    def product(self, p: Product) -> float:
        return self._median(p.shape) if p.shape in self._totals else p.flops * self._per_flop

    def copy(self, count: float) -> float:
        return count * self._median("byte")

    def elements(self, count: float) -> float:
        return count * self._median("element")

    def send(self, c: Collective, across: bool) -> float:
        return c.bytes * self._median(len(c.devices))

    @property
    def _per_flop(self) -> float:
        spent = sum(self._median(shape) / self._flops[shape] * total for shape, total in self._totals.items())
        return spent / sum(self._totals.values()) if self._totals else 1e-10

    def _median(self, name: Any) -> float:
        return statistics.median(self._seen[name])


def per_byte() -> Callable[[], float]:
    """Of arrays larger than any cache, read and written."""
    x = np.ones(1 << 23, np.float32)
    took = timer(lambda x: x + 1.0, (x,), guess=5e-3, onward=True)
    return lambda: took() / (2 * x.nbytes)


def per_element() -> Callable[[], float]:
    """Of a chain of operations such as a norm with an activation behind it, on arrays that stay in the cache."""
    x = np.ones((256, 256), np.float32)

    def chain(x: jax.Array) -> jax.Array:
        return jax.nn.gelu(x * 1.1 + 0.3, approximate=True) * (1.0 - x) + jnp.maximum(x, 0.5) * 0.7

    operations = 18  # what `chain` comes to, tanh as one
    took = timer(chain, (x,), guess=1e-4, onward=True)
    return lambda: took() / (operations * x.size)


def per_sent(size: int) -> Callable[[], float]:
    """A byte that a device sends in a sum over as many devices as there are here, at most `size`."""
    devices = jax.local_devices()[:size]
    if len(devices) < 2:
        return lambda: 0.0
    x = np.ones((len(devices), 1 << 20), np.float32)
    mean = lambda x: jax.lax.psum(x, "all") * (1.0 / len(devices))  # noqa: E731
    took = timer(mean, (x[0],), guess=5e-3, devices=devices, onward=True)
    return lambda: took() / (2 * x[0].nbytes * (len(devices) - 1) / len(devices))


def timer(
    function: Callable[..., Any],
    args: tuple[np.ndarray, ...],
    *,
    guess: float,
    devices: list[Any] | None = None,
    onward: bool = False,
) -> Callable[[], float]:
    """Each call gives the seconds that `function` takes when every device calls it on its own copy of `args`, which lie there
    only meanwhile.

    onward: it gives what it takes, and each call takes what the last one gave; else its result is not looked at."""
    mesh = Mesh(np.array(devices or jax.local_devices()), ("all",))
    repeat = int(np.clip(BLOCK / max(guess, 1e-7), 1, 400))

    def several(*args: jax.Array) -> jax.Array:
        if onward:
            return jax.lax.fori_loop(0, repeat, lambda _, x: function(x), args[0][0])[None]

        def once(_: Any, total: jax.Array) -> jax.Array:
            # Tied to the last turn's result, so that nothing is moved out of the loop, and used whole.
            held, total = jax.lax.optimization_barrier((tuple(a[0] for a in args), total))
            out = jax.lax.optimization_barrier(function(*held))
            return total + out.ravel()[0].astype(jnp.float32)

        return jax.lax.fori_loop(0, repeat, once, jnp.zeros((), jnp.float32))[None]

    place = NamedSharding(mesh, PartitionSpec("all"))
    specs = PartitionSpec("all")
    run = jax.jit(jax.shard_map(several, mesh=mesh, in_specs=(specs,) * len(args), out_specs=specs, check_vma=False))

    def took() -> float:
        spread = [jax.device_put(np.broadcast_to(a, (mesh.size, *a.shape)), place) for a in args]
        jax.block_until_ready(run(*spread))
        began = time.perf_counter()
        jax.block_until_ready(run(*spread))
        return time.perf_counter() - began

    return lambda: took() / repeat


def remake(shape: tuple) -> tuple[Callable[..., Any], tuple[np.ndarray, ...]] | None:
    """A product as a function of two arrays, from what hlo.py kept of it; None where it is of no known form."""
    kind, dtype, left, right, rest = shape
    dtype = {"f32": np.float32, "bf16": jnp.bfloat16, "f16": np.float16, "f64": np.float64}.get(dtype)
    if dtype is None:
        return None
    args = tuple(np.broadcast_to(np.array(0.01, dtype), dims) for dims in (left, right))
    if kind == "dot":
        dims = {key: tuple(map(int, value.split(","))) for key, value in re.findall(r"(\w+_dims)=\{([\d,]+)\}", rest)}
        contracting = dims["lhs_contracting_dims"], dims["rhs_contracting_dims"]
        batch = dims.get("rhs_batch_dims", ())
        batches = dims.get("lhs_batch_dims", batch), batch
        return lambda a, b: jax.lax.dot_general(a, b, (contracting, batches)), args
    if kind == "convolution":
        window = {key: value.split("x") for key, value in re.findall(r"(\w+)=([\dx_\-]+)", rest)}
        labels = re.search(r"dim_labels=([^_]+)_([^-]+)->(\S+)", rest)
        if labels is None or "feature_group_count" in rest or "batch_group_count" in rest or "size" not in window:
            return None
        count = len(window["size"])
        numbers = lambda key: tuple(map(int, window.get(key, ["1"] * count)))  # noqa: E731
        pads: Any = [tuple(map(int, pad.split("_"))) for pad in window.get("pad", ["0_0"] * count)]
        names = [part.translate(str.maketrans("bfio0123", "NCIO0123")) for part in labels.groups()]
        form = jax.lax.conv_dimension_numbers(left, right, tuple(names))
        return (
            lambda a, b: jax.lax.conv_general_dilated(
                a, b, numbers("stride"), pads, numbers("lhs_dilate"), numbers("rhs_dilate"), form
            ),
            args,
        )
    return None


def flops_of(work: list[Work]) -> float:
    return math.fsum(p.flops * w.times for w in work for p in w.products)
