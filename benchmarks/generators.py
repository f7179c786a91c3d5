"""What train_step.py and sampling.py measure: networks and batches, our side of the comparison, and the driver of both.

The peer is generators_torch.py. Both sides load the same weights, texts, pictures, times and noise from one file."""

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from workers import ROOT, Work, Worker, environment, median, race, serve, versions

sys.path.insert(0, str(ROOT))
TOKENS, TEXT = 16, 384  # of a caption, and the width of its features
CHECKED = 20  # losses that must agree before anything is timed
TOLERANCE = {False: 1e-5, True: 1e-3}  # relative, in float32 and in bfloat16


def problems() -> dict[str, dict[str, Any]]:
    """By name: the network, the side of its pictures, and the batch. The two last are a GPU's."""
    from jaxgen.families.transformer import Transformer
    from jaxgen.families.unet import UNet

    quick = UNet(widths=(64, 128), down=(1, 2), up=(2, 2))
    base = Transformer(width=768, depth=12, head_dim=64, patch=2)
    large = Transformer(width=1152, depth=28, head_dim=128, patch=2)
    return {
        "transformer": {"network": Transformer(width=128, depth=4, head_dim=32, patch=4), "size": 32, "batch": 64},
        "unet": {"network": quick, "size": 32, "batch": 16},
        "dit_130m": {"network": base, "size": 32, "batch": 256},
        "dit_xl": {"network": large, "size": 32, "batch": 64},
        "tiny": {"network": Transformer(width=32, depth=1, head_dim=16, patch=8), "size": 16, "batch": 8},
    }


class Ours:
    def __init__(self):
        from jaxgen.parallel import runtime

        runtime.start(allow_cpu=True)

    def write(self, name: str, file: str, bfloat16: bool) -> dict[str, Any]:
        """Makes a problem; returns what the other side must know of it."""
        import jax
        import jax.numpy as jnp

        from jaxgen.families.base import Shapes
        from jaxgen.families.flow import Flow
        from jaxgen.nn.layers import time_frequencies
        from jaxgen.nn.module import flatten, unflatten
        from jaxgen.train.config import OptimizerConfig, TrainConfig
        from jaxgen.train.state import LOSS, stream

        what = problems()[name]
        network, size, batch = what["network"], what["size"], what["batch"]
        self.family = Flow(network=network)
        self.shapes = Shapes((size, size, 3), TEXT, TEXT)
        # Steps as of a run that has just begun: no warm-up, so that twenty of them go somewhere.
        self.optimizer = OptimizerConfig(schedule="constant", warmup_steps=0, learning_rate=3e-4)
        self.train_config, self.dtype = TrainConfig(batch_size=batch), jnp.bfloat16 if bfloat16 else jnp.float32
        rng = np.random.default_rng(0)
        params = dict(flatten(jax.device_get(jax.jit(self.family.init, static_argnums=1)(jax.random.key(0), self.shapes))))
        # What starts at zero would hide what stands behind it.
        params = {
            n: rng.normal(0, 0.02, p.shape).astype(np.float32) if not np.any(p) else np.asarray(p) for n, p in params.items()
        }
        self.params = unflatten(params)
        lengths = rng.integers(4, TOKENS + 1, (CHECKED, batch))
        self.batches = {
            "image": rng.integers(0, 256, (CHECKED, batch, size, size, 3), np.uint8),
            "hidden": rng.normal(size=(CHECKED, batch, TOKENS, TEXT)).astype(np.float32),
            "pooled": rng.normal(size=(CHECKED, batch, TEXT)).astype(np.float32),
            "mask": np.arange(TOKENS) < lengths[..., None],
        }

        @jax.jit
        def drawn(step):  # as Flow.losses does for the first of one micro-batch
            key = jax.random.fold_in(stream(0, step, LOSS), 0)
            time_key, noise_key, _ = jax.random.split(key, 3)
            return self.family.draw_times(time_key, batch), jax.random.normal(noise_key, (batch, size, size, 3))

        times, noises = zip(*(drawn(step) for step in range(CHECKED)), strict=True)
        generator: dict[str, Any] = {f"weight:{n.removeprefix('generator.')}": p for n, p in params.items()}
        # Their last bit turns a cosine by 1e-4, and is another one in another library.
        frequencies = jax.jit(time_frequencies, static_argnums=0)(64)
        drawing: dict[str, Any] = {"frequencies": frequencies, "t": np.stack(times), "noise": np.stack(noises)}
        np.savez(file, **generator, **self.batches, **drawing)
        self.noise = np.asarray(noises[0])
        kind = {"Transformer": "transformer", "UNet": "unet"}[type(network).__name__]
        told = dataclasses.asdict(self.optimizer) | {"ema_decay": self.train_config.ema_decay, "bfloat16": bfloat16}
        told |= {name: getattr(self.family, name) for name in ("time_mean", "time_uniform", "loss_min_time")}
        return told | {
            "network": dataclasses.asdict(network) | {"type": kind},
            "size": size,
            "text": TEXT,
            "batch": batch,
            "train_flops": self.family.train_flops(self.shapes, TOKENS) * batch,
            "flops": self.family.flops(self.shapes, TOKENS),
            "width": getattr(network, "width", None) or network.widths[-1],
            "parameters": sum(p.size for p in params.values()),
            "hardware": jax.devices()[0].device_kind,
            "versions": f"jax {jax.__version__}",
        }

    def train(self, variant: str, drawn: bool) -> Work:
        """run: one step, with times and noise drawn in it; show: its loss. `drawn` is the other side's."""
        import jax
        import jax.numpy as jnp

        from jaxgen.parallel.mesh import MeshConfig, batch_sharding, make_mesh, on_mesh, replicated
        from jaxgen.text.features import TextFeatures
        from jaxgen.train.optimizers import make_optimizer
        from jaxgen.train.state import TrainState, create, shardings
        from jaxgen.train.step import make_step

        mesh = make_mesh(MeshConfig())
        optimizers = {group: make_optimizer(self.optimizer, 1_000_000, mesh) for group in self.family.groups}
        make = lambda: create(self.family, self.shapes, optimizers, 0)  # noqa: E731
        where = shardings(jax.eval_shape(make), self.family.logical_axes(self.shapes), mesh)
        state = jax.jit(make, out_shardings=where)()
        params = jax.device_put(self.params, where.params)
        state = TrainState(state.step, params, jax.tree.map(jnp.copy, params), state.opt_state, state.control)
        step = make_step(self.family, optimizers, seed=0, ema_decay=self.train_config.ema_decay, compute_dtype=self.dtype)
        put = lambda x: jax.device_put(x, batch_sharding(mesh))  # noqa: E731
        b = self.batches
        batches = [
            {"image": put(b["image"][i]), "text": TextFeatures(put(b["hidden"][i]), put(b["pooled"][i]), put(b["mask"][i]))}
            for i in range(CHECKED)
        ]
        jitted = jax.jit(on_mesh(mesh, step), donate_argnums=0, out_shardings=(where, replicated(mesh)))
        compiled = jitted.lower(state, {}, batches[0]).compile()
        held: dict[str, Any] = {"state": state, "step": 0}

        def run() -> jax.Array:
            held["state"], metrics = compiled(held["state"], {}, batches[held["step"] % CHECKED])
            held["step"] += 1
            return metrics["loss"].block_until_ready()

        return run, np.asarray

    def sample(self, variant: str, count: int, steps: int, guidance: float, shift: float) -> Work:
        """run: `count` pictures by Euler's steps with guidance; show: the pictures in [-1, 1]."""
        import jax
        import jax.numpy as jnp

        from jaxgen.families.base import SampleSettings
        from jaxgen.families.steps import walk
        from jaxgen.text.features import TextFeatures

        family = dataclasses.replace(self.family, sample_shift=shift)
        texts = {name: jnp.asarray(self.batches[name][0][:count]) for name in ("hidden", "pooled", "mask")}
        none = {name: jnp.repeat(self.batches[name][1][:1], count, 0) for name in texts}
        settings = SampleSettings(self.shapes.image, "euler", steps, guidance)
        params = jax.tree.map(lambda p: jnp.asarray(p, self.dtype), self.params)

        @jax.jit
        def draw(params, text, null, begin):
            return walk(family._stepper(params, text, null, settings), steps, begin)

        given = params, TextFeatures(**texts), TextFeatures(**none), jnp.asarray(self.noise[:count])
        return lambda: draw(*given).block_until_ready(), np.asarray

    def bare(self, variant: str, tokens: int, width: int) -> Work:
        import jax

        keys = jax.random.key(0), jax.random.key(1)
        shapes = (tokens, width), (width, 4 * width)
        x, kernel = (jax.random.normal(key, s, self.dtype) for key, s in zip(keys, shapes, strict=True))
        product = jax.jit(lambda x, kernel: x @ kernel)
        return lambda: product(x, kernel).block_until_ready(), lambda y: np.asarray(y, np.float32)


class Driver:
    """Both sides under way, and the table of what they did."""

    def __init__(self, doc: str, add: Any = lambda parser: None):
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
        parser.add_argument("--torch_python", help="an interpreter with torch in it")
        parser.add_argument("--problems", default="transformer,unet")
        parser.add_argument("--variants", default="eager,compiled", help="of the peer")
        parser.add_argument("--rounds", type=int, default=7)
        parser.add_argument("--seconds", type=float, default=2.0, help="of one call of a side")
        parser.add_argument("--bfloat16", action="store_true", help="compute in it, both sides")
        parser.add_argument("--json", help="write the figures here")
        add(parser)
        self.arguments = arguments = parser.parse_args()
        if arguments.worker:
            serve(Ours())
            sys.exit()
        unknown = set(arguments.problems.split(",")) - set(problems())
        if unknown:
            parser.error(f"--problems={','.join(sorted(unknown))}: known are {', '.join(problems())}")
        self.against = versions(arguments.torch_python, ("torch",), parser)
        self._scratch = tempfile.TemporaryDirectory(prefix="jaxgen-generators-")
        self.place = Path(self._scratch.name)
        both, here = environment(self.place), Path(__file__).resolve()
        ours = [sys.executable, str(Path(sys.argv[0]).resolve()), "--worker"]
        theirs = [arguments.torch_python, str(here.with_name("generators_torch.py"))]
        self.sides = {
            "ours": Worker(ours, both, self.place / "ours.txt"),
            "torch": Worker(theirs, both, self.place / "torch.txt"),
        }
        self.variants = ("ours", *arguments.variants.split(","))
        self.rows: list[dict[str, Any]] = []
        self.wrong: list[str] = []

    def side(self, variant: str) -> Worker:
        return self.sides["ours" if variant == "ours" else "torch"]

    def load(self, name: str) -> dict[str, Any]:
        file = str(self.place / "problem.npz")
        found = self.sides["ours"].ask(do="write", name=name, file=file, bfloat16=self.arguments.bfloat16)
        self.sides["torch"].ask(do="load", problem=found, file=file)
        return found

    def prepare(self, kind: str, variants: tuple[str, ...], **settings: Any) -> None:
        for variant in variants:
            self.side(variant).ask(do="prepare", kind=kind, variant=variant, **settings)

    def shown(self, variant: str) -> np.ndarray:
        file = self.place / "shown.npy"
        self.side(variant).ask(do="show", variant=variant, file=str(file))
        return np.load(file)

    def race(self, variants: tuple[str, ...]) -> dict[str, list[float]]:
        """Seconds of one run, a number a round."""
        return race(self.side, variants, self.arguments.rounds, self.arguments.seconds)

    def agree(self, name: str, shown: Mapping[str, Any]) -> bool:
        """Whether all variants show the same as ours; a problem is told and remembered."""
        ours, limit = np.asarray(shown["ours"]), TOLERANCE[self.arguments.bfloat16]
        for variant, theirs in shown.items():
            off = float(np.max(np.abs(np.asarray(theirs) - ours)) / np.max(np.abs(ours)))
            if not off <= limit:
                self.wrong.append(f"{name}: {variant} and ours differ by {off:.2g}, more than {limit:g}: no figure")
                print(f"PROBLEM: {self.wrong[-1]}", flush=True)
                return False
        return True

    def tell(self, name: str, problem: dict[str, Any], flops: float, images: int, seconds: dict[str, list[float]]) -> None:
        """A row of the table: medians, the median of the rounds' ratios, and shares of the bare product."""
        rows, width = problem["batch"] * (TOKENS + 64), problem["width"]
        self.prepare("bare", ("ours", "eager"), tokens=rows, width=width)
        bare = {v: 8 * rows * width**2 / median(s) for v, s in self.race(("ours", "eager")).items()}
        peak = _peak(problem["hardware"]) if self.arguments.bfloat16 else None
        row: dict[str, Any] = {"problem": name, "settings": problem, "seconds": seconds, "bare_flops": bare}
        for variant, times in seconds.items():
            ms, rate = median(times) * 1e3, flops / median(times)
            said = {"step_ms": ms, "images_per_sec": images / ms * 1e3, "gflops": rate / 1e9}
            said["share_of_bare"] = rate / bare["ours" if variant == "ours" else "eager"]
            said |= {"mfu": rate / peak} if peak else {}
            if variant != "ours":
                said["ratio"] = median([b / a for a, b in zip(seconds["ours"], times, strict=True)])
            row[variant] = said
            text = f"{name:12s} {variant:9s}{ms:9.1f}{said['images_per_sec']:10.1f}{said['gflops']:10.1f}"
            text += f"{said['share_of_bare']:8.1%}" + (f"{said['mfu']:8.1%}" if peak else f"{'':8s}")
            print(text + (f"{said['ratio']:9.3f}" if "ratio" in said else ""), flush=True)
        self.rows.append(row)

    def head(self, what: str, problem: dict[str, Any]) -> None:
        arguments, cores = self.arguments, len(os.sched_getaffinity(0))
        print(
            f"{problem['versions']} against {self.against}; {problem['hardware']}, {cores} cores, "
            f"{'bfloat16' if arguments.bfloat16 else 'float32'}; medians of {arguments.rounds}"
        )
        if arguments.bfloat16 and _peak(problem["hardware"]) is None:
            print("the peak of this device is not known: no MFU")
        columns = "".join(f"{c:>{w}s}" for c, w in (("ms", 9), ("images/s", 10), ("GFLOP/s", 10), ("of bare", 8), ("MFU", 8)))
        print(f"{what:12s} {'side':9s}{columns}{'/ ours':>9s}", flush=True)

    def end(self) -> None:
        """Writes the figures; the exit status is 1 where two sides differed."""
        for side in self.sides.values():
            side.end()
        if self.arguments.json:
            from jaxgen.storage import as_path, write_json

            settings = {name: value for name, value in vars(self.arguments).items() if name != "worker"}
            report = {
                "against": self.against,
                "commit": _commit(),
                "settings": settings,
                "rows": self.rows,
                "wrong": self.wrong,
            }
            write_json(as_path(self.arguments.json), report)
        sys.exit(bool(self.wrong))


def _peak(kind: str) -> float | None:
    from jaxgen.parallel.devices import known

    device = known(kind)
    return device and device.flops


def _commit() -> str:
    import subprocess

    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
