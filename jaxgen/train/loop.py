"""A run from its configuration to its last checkpoint; the same call again goes on where it stopped."""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
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
from jaxgen.parallel.kept import KeptProgram
from jaxgen.parallel.mesh import batch_sharding, check_batch, make_mesh, replicated
from jaxgen.parallel.runtime import compute_dtype
from jaxgen.storage import Path, as_path, write_json
from jaxgen.text import TextEncoder
from jaxgen.text.adapt import keep_frozen, text_of, with_text
from jaxgen.text.cache import CaptionTable
from jaxgen.train.checkpoints import Checkpoints
from jaxgen.train.config import RunConfig
from jaxgen.train.evaluation import Evaluator, check_metric, scores_of
from jaxgen.train.fit import fit
from jaxgen.train.logging import tell
from jaxgen.train.optimizers import make_optimizer
from jaxgen.train.state import TrainState, abstract_state, create, fresh
from jaxgen.train.step import Step, make_step, to_float
from jaxgen.train.workdir import claim, is_finished, traced_from

FOR_TABLES = 1_000_000  # pictures: the captions of more are not encoded ahead, on a CPU either


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
    kept = KeptProgram(config, mesh, traced_from(config))

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


def take_weights(state: TrainState, origins: str, skip: tuple[str, ...], where: Any) -> TrainState:
    """The state with other runs' weights, each from the first that has it; lists what was taken, left there and is new."""
    ours, taken = dict(flatten(state.params)), {}
    for origin in origins.split(","):
        try:
            theirs = read_weights(origin)
        except UserError as error:
            raise UserError(f"train.init_from={origin}: {error}") from None
        shared = [n for n in ours if n in theirs and n not in taken and not n.startswith(skip)]
        misfits = [f"{n} {theirs[n].shape} there, {ours[n].shape} here" for n in shared if theirs[n].shape != ours[n].shape]
        if misfits:
            raise UserError(
                f"train.init_from={origin}: {'; '.join(misfits[:3])}{' …' if len(misfits) > 3 else ''}: "
                "name what is to start fresh in train.init_skip"
            )
        if not shared:
            raise UserError(f"train.init_from={origin} has no weight of this network{' that is still wanted' if taken else ''}")
        tell(f"from {origin}: took {len(shared)} tensors")
        tell(f"  left there: {brief(sorted(theirs.keys() - set(shared)))}")
        taken |= {name: theirs[name] for name in shared}
    tell(f"  new here: {brief(sorted(ours.keys() - taken.keys()))}")
    params = unflatten(ours | taken)
    params = jax.tree.map(lambda p, s: jax.device_put(np.asarray(p), s), params, where.params)
    ema = jax.tree.map(jnp.copy, {group: params[group] for group in state.ema_params})
    return TrainState(state.step, params, ema, state.opt_state, state.control)
