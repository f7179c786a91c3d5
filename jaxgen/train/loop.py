"""A run from its configuration to its last checkpoint; the same call again goes on where it stopped."""

import dataclasses
import json
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgen import config as configs
from jaxgen.data import buckets
from jaxgen.data.pipeline import Source, batches, load_source, to_device
from jaxgen.data.precompute import precompute
from jaxgen.errors import UserError
from jaxgen.families.base import Shapes, served
from jaxgen.model import check_frozen, fingerprints, read_weights
from jaxgen.nn.module import Params, flatten, unflatten
from jaxgen.parallel.kept import KeptProgram, hits
from jaxgen.parallel.memory import Checked, bytes_a_device, checked, compile_checked
from jaxgen.parallel.mesh import batch_sharding, check_batch, make_mesh, on_mesh, replicated
from jaxgen.parallel.runtime import compute_dtype, steady_memory
from jaxgen.storage import Path, as_path, explain, is_remote, sweep, write_bytes, write_json
from jaxgen.text import TextEncoder
from jaxgen.text.adapt import keep_frozen, text_of, with_text
from jaxgen.text.cache import CaptionTable
from jaxgen.train.checkpoints import Checkpoints, read_config
from jaxgen.train.config import RunConfig
from jaxgen.train.evaluation import Evaluator, check_metric, keep_best, scores_of
from jaxgen.train.goodput import Goodput
from jaxgen.train.logging import Log, duration, peak_flops, progress_line
from jaxgen.train.optimizers import make_optimizer, same_until
from jaxgen.train.state import TrainState, abstract_state, create, fresh
from jaxgen.train.step import Step, make_step, to_float
from jaxgen.train.stopping import stopping

FOR_TABLES = 1_000_000  # pictures: the captions of more are not encoded ahead, on a CPU either

# What may differ between the command that began a run and the one that goes on: none of it changes a step's numbers.
MAY_CHANGE = (
    "mesh.",
    "sample.",
    "eval.",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "data.dir",
    "data.source",
    "data.threads",
    "data.keep_in_memory",
    "data.max_bad",
    "data.max_bad_shards",
    "family.codec.source",  # moved; that it is the same one is seen by its fingerprint
)


def run(config: RunConfig, workdir: Path, *, profile: bool = False) -> None:
    """Train until config.train.steps, early stopping, or SIGTERM/SIGINT (saves, exits with status 0).

    Raises UserError for whatever the user can mend, a loss that is not finite included."""
    began = time.monotonic()
    family = config.family.resolve()
    config = dataclasses.replace(config, family=family)
    mesh = make_mesh(config.mesh)
    check_batch(config.train.batch_size, mesh, config.train.accumulate)
    if config.eval.every:
        check_metric(config, scores_of(config))
    claim(workdir, config)
    kept = KeptProgram(config, mesh, traced_from(configs.to_dict(config)))

    # Input
    encoder = config.text.load(mesh)
    source = load_source(config.data, shapes=sizes(config, encoder))
    in_step = encodes_in_step(config, jax.default_backend(), len(source))
    reworded = source.rewritings.key if source.rewritings is not None else ""
    held_out = load_source(config.data, "validation") if config.eval.every else None
    table = None
    if not in_step:
        captions = [caption for split in (source, held_out) if split is not None for caption in split.captions()]
        table = CaptionTable(encoder, captions, as_path(config.data.dir) / "captions" / config.data.name.replace("/", "_"))
    ready = featurize(encoder, table, source)
    frozen = family.load_frozen()
    marks = fingerprints(config, frozen)

    # State
    step_fn, make, abstract, shapes = assemble(config, mesh, encoder, in_step, compute_dtype(config.train.compute_dtype))
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    checkpoints = Checkpoints(workdir, config.train.keep_checkpoints, config.eval.score if config.eval.every else None)
    restored = checkpoints.restore(abstract)
    control: dict[str, Any] = {"best": None, "waited": 0, "stopped": False, "spent": {}}
    if restored is not None:
        state, meta = restored
        if meta["text_fingerprint"] != encoder.fingerprint:
            raise UserError(f"{workdir} was begun with other text encoder files: restore those or choose another --workdir")
        check_frozen(config, frozen, meta, str(workdir))
        if meta.get("rewritten", "") != reworded:
            raise UserError(f"{workdir} was begun with captions that another language model rewrote (data.rewrite): restore it")
        control |= meta["control"]
    else:
        state = fresh(make, encoder.params, where)
        if config.train.init_from is not None:
            state = take_weights(state, config.train.init_from, config.train.init_skip, where)
    keep_frozen(encoder, text_of(state.params))
    frozen = jax.device_put(frozen, replicated(mesh)) | ({"text": encoder.params} if in_step else {})
    if jax.process_index() == 0:
        write_json(workdir / "config.json", configs.to_dict(config))
    step = int(state.step)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    tell(f"{count / 1e6:.2f} million parameters, {len(source)} pictures, from step {step} to {config.train.steps}")
    if is_finished(config, workdir, step, control):
        checkpoints.close()
        return

    # Step
    source.made = precomputed(config, source, frozen)
    raw = batches(
        source,
        seed=config.seed,
        batch_size=config.train.batch_size,
        start_step=step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        caption_dropout=config.text.dropout,
    )
    feed = to_device(raw, batch_sharding(mesh), ready)
    use = f"draw with: python sample.py --workdir={workdir} --prompt=..."
    if not family.draws:
        use = f"draw in its latents with: --config.family.codec=pretrained --config.family.codec.source={workdir}"
    wanted = bool(config.sample.prompts) or not family.draws
    evaluator = Evaluator(config, workdir, encoder, frozen, mesh, held_out or source, ready)
    fit(
        config,
        workdir,
        step_fn,
        state,
        frozen,
        feed,
        where=where,
        kept=kept,
        checkpoints=checkpoints,
        control=control,
        marks={"text_fingerprint": encoder.fingerprint, "frozen_fingerprint": marks, "rewritten": reworded},
        flops=lambda batch: family.train_flops(shapes_of(batch, shapes), tokens_of(batch)),
        evaluate=evaluator.evaluate,
        draw=evaluator.draw if wanted else None,
        use=use,
        began=began,
        profile=profile,
    )


class Assembly(NamedTuple):
    """What a configuration's step is made of; nothing is computed and no data are read."""

    step: Step
    make: Callable[[Params], TrainState]  # a fresh state, from the text encoder's weights; to be jitted
    state: TrainState  # what it makes: arrays of jax.ShapeDtypeStruct with their shardings
    shapes: Shapes


def assemble(config: RunConfig, mesh: Mesh, encoder: TextEncoder, in_step: bool, dtype: Any) -> Assembly:
    """For a configuration whose family is resolved; the mesh's devices need not exist (parallel/plan.py). in_step: whether
    the step reads captions. dtype: what it computes in."""
    family, adapt = config.family, config.text.adapt
    shapes = config.shapes(encoder)
    optimizers = {group: make_optimizer(config.optimizer, config.train.steps, mesh, config.text) for group in family.groups}
    architecture: Any = encoder.pretrained and encoder.pretrained.architecture

    def make(base: Params) -> TrainState:
        return create(family, shapes, optimizers, config.seed, lambda key: adapt.init(key, base, architecture))

    axes = with_text(family.logical_axes(shapes), adapt.axes(architecture), family.drawn[0])
    step = step_of(config, family, optimizers, dtype, encode=encoder.apply if in_step else None, adapt=adapt)
    return Assembly(step, make, abstract_state(make, encoder.params, axes, mesh), shapes)


def step_of(config: Any, family: Any, optimizers: dict[str, Any], dtype: Any, **text: Any) -> Step:
    """make_step's, as the configuration of a run of any kind has it. text: its arguments `encode` and `adapt`."""
    return make_step(
        family,
        optimizers,
        seed=config.seed,
        ema_decay=config.train.ema_decay,
        accumulate=config.train.accumulate,
        compute_dtype=dtype,
        **text,
    )


def sizes(config: RunConfig, encoder: TextEncoder) -> list[buckets.Size]:
    """The heights and widths that pictures are to have. Raises UserError where the network serves none but the square."""
    wanted = buckets.shapes(config.data.image_size, config.data.max_aspect_ratio)
    try:
        return served(config.family, config.shapes(encoder), wanted)
    except UserError as error:
        raise UserError(f"data.max_aspect_ratio={config.data.max_aspect_ratio}: {error}") from None


def encodes_in_step(config: RunConfig, platform: str, pictures: int = 0) -> bool:
    """Whether captions of so many pictures are read inside the step there, rather than once for all. Raises UserError."""
    if config.text.adapted and not config.family.draws:
        raise UserError("text.adapt trains the text encoder, and this family reads no text: leave it out")
    wanted = config.text.in_step if config.text.in_step is not None else platform != "cpu" or pictures > FOR_TABLES
    return wanted or config.text.adapted or not config.family.draws  # captions that nobody reads cost nothing there


def jitted(step: Step, where: Any) -> Any:
    """The step as it is compiled, for a state laid out as `where`, whose arrays it takes over."""
    mesh = jax.tree.leaves(where)[0].mesh
    return jax.jit(on_mesh(mesh, step), donate_argnums=0, out_shardings=(where, replicated(mesh)))


def fit(
    config: Any,
    workdir: Path,
    step_fn: Step,
    state: TrainState,
    frozen: Params,
    feed: Iterator[Any],
    *,
    where: Any,
    kept: KeptProgram,
    checkpoints: Checkpoints,
    control: dict[str, Any],
    marks: dict[str, Any],
    flops: Callable[[Any], float],
    evaluate: Callable[[TrainState], dict[str, float]],
    draw: Callable[[TrainState, int, Log], None] | None,
    use: str,
    began: float,
    unit: str = "images",
    profile: bool = False,
) -> TrainState:
    """The loop of a run from a state laid out as `where`, whose arrays it takes over, on batches of `feed`: the last state.

    config: has the sections train, sample, eval and mesh. marks: of what the state belongs to, kept with each checkpoint.
    flops: of one example of a batch in a step. draw: what is looked at every sample.every steps. use: what a finished run is
    for. unit: what an example is called. began: when the run did, by time.monotonic."""
    step = first = int(state.step)
    batch = next(feed)
    compiling = time.monotonic()
    programs = Programs(jitted(step_fn, where), config, jax.tree.leaves(where)[0].mesh, kept, json.dumps(marks))
    used = programs(state, frozen, batch).memory
    compile_s = time.monotonic() - compiling

    # Loop
    log = Log(workdir, step, configs.to_dict(config))
    clock = Goodput(began, control["spent"], log.last)
    log.write(step, {"compile_s": compile_s, "peak_memory_bytes": used, "startup_s": time.monotonic() - began, **clock.told()})
    hush_writers()
    trace = Trace(workdir, first + 10) if profile else None
    metrics: dict[str, jax.Array] = {}

    def save(metrics: dict[str, float] | None = None) -> None:
        clock.to("save")
        control["spent"] = clock.seconds()
        log.flush()
        meta = {"control": control, **marks, "config": configs.to_dict(config)}
        checkpoints.wait()
        _ = checkpoints.failed  # an earlier failure has been told: whether the run ends well, its last checkpoint decides
        checkpoints.save(state, meta, metrics)
        clock.to("step")

    def stop_if_failed(metrics: dict[str, Any]) -> None:
        if int(metrics["failed"]) >= 0:
            log.flush()
            checkpoints.close()
            raise UserError(
                # Steps are counted from one here, as in metrics.jsonl.
                f"the loss or gradient of step {int(metrics['failed']) + 1} is not finite; nothing of it was saved. "
                "Lower optimizer.learning_rate or optimizer.clip_norm and go on from the last checkpoint in another --workdir"
                " (train.init_from)"
            )

    with steady_memory(), stopping() as asked_to_stop:
        clock.to("step")
        since, since_step, done_flops = time.monotonic(), step, 0.0
        while step < config.train.steps and not control["stopped"]:
            if metrics:
                # One step in flight besides the running one: enough to hide the host's work, and no pile-up on a CPU.
                jax.block_until_ready(metrics["loss"])
            done_flops += flops(batch) * config.train.batch_size
            clock.to("restart")  # a shape that has not come before is compiled now
            program = programs(state, frozen, batch).program
            clock.to("step")
            state, metrics = program(state, frozen, batch)
            step += 1
            if trace is not None:
                trace.at(step, metrics)
            last, stops = step == config.train.steps, asked_to_stop(step)
            if not (last or stops):
                batch = next(feed)
            if step % config.train.log_every == 0 or last or stops:
                values = {name: float(value) for name, value in jax.device_get(metrics).items()}
                stop_if_failed(values)
                now = time.monotonic()
                ms = (now - since) * 1000 / (step - since_step)
                rate = done_flops / (now - since)
                values |= {"step_ms": ms, f"{unit}_per_sec": config.train.batch_size * 1000 / ms, "gflops": rate / 1e9}
                peak = peak_flops()
                if peak is not None:
                    values["mfu"] = rate / (peak * jax.device_count())
                values.pop("failed")
                log.write(step, values | clock.told())
                tell(progress_line(step, config.train.steps, values))
                since, since_step, done_flops = time.monotonic(), step, 0.0
            scores = None
            clock.to("look")
            if config.eval.every and (step % config.eval.every == 0 or last) and not stops:
                stop_if_failed(metrics)
                scores = evaluate(state)
                log.write(step, scores)
                tell(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in scores.items()))
                keep_best(control, config, scores)
            if draw is not None and (step % config.sample.every == 0 or last) and not stops:
                stop_if_failed(metrics)
                draw(state, step, log)
            clock.to("step")
            if step % config.train.checkpoint_every == 0 or last or stops or scores is not None:
                stop_if_failed(metrics)
                save(scores)
            if scores is not None or step % config.sample.every == 0:
                since, since_step, done_flops = time.monotonic(), step, 0.0
            if stops:
                break
        clock.to("save")
        done = checkpoints.wait() and not checkpoints.failed
    log.flush()
    checkpoints.close()
    if trace is not None:
        trace.close()
    if not done:
        raise UserError(f"the last checkpoint of {workdir} could not be written (see above); run the same command again")
    if step < config.train.steps and not control["stopped"]:
        tell(f"stopped at step {step} and saved; the same command goes on from here")
    else:
        spent, share = sum(clock.seconds().values()), clock.told()["goodput"]
        why = f": {config.eval.metric} has not improved for {config.eval.patience} evaluations" if control["stopped"] else ""
        tell(f"finished at step {step} after {duration(spent)} ({share:.0%} of it in steps){why}; {use}")
    return state


class Programs:
    """The compiled step, one for each shape of batch that comes; the first may be kept from an earlier start with the same
    marks. Raises UserError where one does not fit into memory."""

    def __init__(self, step: Any, config: Any, mesh: Mesh, kept: KeptProgram, marks: str):
        self._step, self._config, self._mesh, self._kept, self._marks = step, config, mesh, kept, marks
        self._compiled: dict[Any, Checked] = {}

    def __call__(self, state: TrainState, frozen: Params, batch: Any) -> Checked:
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if shapes not in self._compiled:
            began, arguments = time.monotonic(), (state, frozen, batch)
            known = self._config, self._mesh, bytes_a_device((state, frozen))
            found = None if self._compiled else self._kept.get(arguments, self._marks)
            if found is not None:
                made = checked(found, *known)
            else:
                with hits() as read:
                    made = compile_checked(self._step.lower(*arguments), *known)
                # What JAX has read from its cache XLA cannot write again: its functions would be missing.
                if not (self._compiled or read):
                    self._kept.keep(made.program, arguments, self._marks)
            self._compiled[shapes] = made
            how = "compiled" if found is None else "taken from an earlier start"
            tell(f"{how} in {time.monotonic() - began:.1f} s; {made.memory / 2**30:.2f} GiB a device")
        return self._compiled[shapes]


def traced_from(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a configuration that a step can hang on; for the mesh and its devices see KeptProgram."""
    return {
        name: traced_from(value, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in fields.items()
        if not f"{prefix}{name}".startswith(MAY_CHANGE)
    }


def is_finished(config: Any, workdir: Path, step: int, control: dict[str, Any]) -> bool:
    """Whether a run has nothing left to do, which is told."""
    done = step >= config.train.steps or control["stopped"]
    if done:
        tell(f"{workdir} is finished (step {step}); raise train.steps or choose another --workdir")
    return done


def precomputed(config: RunConfig, source: Source, frozen: Params) -> dict[str, np.ndarray] | None:
    """What the family makes of the pictures, from files beside the set; None where it sees them, or makes it in the step."""
    if not precomputes(config, jax.default_backend(), bool(source.changing)):
        return None
    codec: Any = getattr(config.family, "codec", None)
    make = lambda frozen, image: config.family.precompute(frozen, to_float(image))  # noqa: E731
    key = {"codec": configs.to_dict(codec) | {"source": ""}, "weights": fingerprints(config, frozen)}
    return precompute(config.data, source, make, frozen, key)


def precomputes(config: RunConfig, platform: str, changing: bool) -> bool:
    """Whether what the family's codec makes of the pictures is kept there, ahead of the steps. changing: whether these are
    cropped at random or of several shapes."""
    wanted = config.data.precompute if config.data.precompute is not None else platform == "cpu" and not changing
    return wanted and getattr(config.family, "codec", None) is not None


def tell(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


def claim(workdir: Path, config: Any) -> None:
    """Makes the directory, or clears it of what a killed run had begun to write; raises UserError where it cannot be written
    or holds another run's checkpoints."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain(error, workdir) from error
    if not is_remote(workdir) and not os.access(workdir, os.W_OK):
        raise UserError(f"no permission to write {workdir}: choose a directory of your own")
    previous = read_config(workdir)
    steps = Checkpoints(workdir, keep=None).steps() if previous is not None else []
    if previous is not None and steps:  # else it came to nothing
        check_same(workdir, previous, config, max(steps))
    if jax.process_index() == 0:
        for directory in (workdir, workdir / "samples"):
            sweep(directory)


def check_same(workdir: Path, previous: dict[str, Any], config: Any, step: int) -> None:
    """Raises UserError where the directory's config.json says something else, for what a run at this step hangs on."""
    there = configs.from_dict(type(config), previous, f"{workdir}/config.json")  # what is newer has its default
    lengths = there.train.steps, config.train.steps
    alike = lambda: not config.text.adapt.scheduled and same_until(config.optimizer, *lengths, step)  # noqa: E731
    changed = [
        f"{name} ({old} there, {new} here)"
        for name, old, new in configs.differences(configs.to_dict(there), configs.to_dict(config))
        if not name.startswith(MAY_CHANGE) and not (name == "train.steps" and alike())
    ]
    if changed:
        raise UserError(
            f"{workdir} holds a run of another configuration: {'; '.join(changed)}. Choose another --workdir, or change "
            f"only what may differ: {', '.join(name.rstrip('.') for name in MAY_CHANGE)} (and train.steps where the rate up to "
            f"step {step} stays the same: optimizer.schedule=constant, or trapezoid before its fall)"
        )


def featurize(encoder: TextEncoder, table: CaptionTable | None, source: Source) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """batch -> what travels to the device: features from the table, or token ids of one fixed length."""
    if table is not None:
        return lambda batch: {**seen(batch), "text": table.lookup(batch["caption"])}
    some = [caption for caption, _ in zip(source.captions(), range(20_000), strict=False)]
    length = encoder.bucket(int(encoder.count(some).max(initial=1)))
    return lambda batch: {**seen(batch), **encoder.tokenize(batch["caption"], length=length)}


def seen(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch without its captions."""
    return {name: value for name, value in batch.items() if name != "caption"}


def shapes_of(batch: dict[str, Any], usual: Shapes) -> Shapes:
    """Those of a batch's pictures; the usual ones where it has their latents."""
    return usual._replace(image=batch["image"].shape[1:]) if "image" in batch else usual


def tokens_of(batch: dict[str, Any]) -> int:
    return (batch["text"].mask if "text" in batch else batch["input_ids"]).shape[1]


def brief(names: Sequence[str]) -> str:
    """Names of weights for one line: each, or where they are many how many of each part of the network."""
    if len(names) > 30:
        parts = Counter(".".join(name.split(".")[:2]) for name in names)
        names = [f"{part} ({count})" for part, count in parts.items()]
    return ", ".join(names) or "none"


def take_weights(state: TrainState, origin: str, skip: tuple[str, ...], where: Any) -> TrainState:
    """The state with another run's EMA weights; lists what was taken, what is new here and what was left there."""
    try:
        theirs = read_weights(origin)
    except UserError as error:
        raise UserError(f"train.init_from={origin}: {error}") from None
    ours = dict(flatten(state.params))
    misfits = [
        f"{name} {theirs[name].shape} there, {ours[name].shape} here"
        for name in ours
        if name in theirs and theirs[name].shape != ours[name].shape and not name.startswith(skip or ("\0",))
    ]
    if misfits:
        raise UserError(
            f"train.init_from={origin}: {'; '.join(misfits[:3])}{' …' if len(misfits) > 3 else ''}: "
            "name what is to start fresh in train.init_skip"
        )
    taken = [n for n in ours if n in theirs and theirs[n].shape == ours[n].shape and not n.startswith(skip or ("\0",))]
    if not taken:
        raise UserError(f"train.init_from={origin} has no weight of this network")
    new, left = sorted(ours.keys() - set(taken)), sorted(theirs.keys() - set(taken))
    tell(f"from {origin}: took {len(taken)} tensors")
    tell(f"  new here: {brief(new)}")
    tell(f"  left there: {brief(left)}")
    params = unflatten({name: theirs[name] if name in taken else ours[name] for name in ours})
    params = jax.tree.map(lambda p, s: jax.device_put(np.asarray(p), s), params, where.params)
    ema = jax.tree.map(jnp.copy, {group: params[group] for group in state.ema_params})
    return TrainState(state.step, params, ema, state.opt_state, state.control)


def hush_writers() -> None:
    """From now on a write that fails is told once, by Checkpoints, and not by a traceback of each of Orbax's threads."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    shown = sys.unraisablehook

    def hook(raised: Any) -> None:
        # TensorStore's callbacks into the event loop of a write that has been given up.
        if str(raised.exc_value) != "Event loop is closed":
            shown(raised)

    sys.unraisablehook = hook


class Trace:
    """A profiler trace of ten steps into workdir/profile; for a remote one it is written here and copied whole."""

    def __init__(self, workdir: Path, start: int):
        self._target, self._start, self._on = workdir / "profile", start, False
        self._directory = tempfile.mkdtemp(prefix="jaxgen-profile-") if is_remote(workdir) else os.fspath(self._target)

    def at(self, step: int, metrics: Any) -> None:
        if step == self._start:
            jax.block_until_ready(metrics)
            jax.profiler.start_trace(self._directory)
            self._on = True
        elif step == self._start + 10:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
            for directory, _, files in os.walk(self._directory) if is_remote(self._target) else ():
                for file in files:
                    path = os.path.join(directory, file)
                    write_bytes(self._target / os.path.relpath(path, self._directory), as_path(path).read_bytes())
            tell(f"profile in {self._target}")
