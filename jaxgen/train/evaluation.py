"""What is looked at while training: scores on `validation`, and sheets of pictures."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.data.pipeline import Source, batches
from jaxgen.data.recipe import fit
from jaxgen.errors import NoSpace, UserError
from jaxgen.evaluate.diversity import diversity
from jaxgen.evaluate.pictures import save_png, sheet
from jaxgen.families.base import to_uint8
from jaxgen.model import Model
from jaxgen.parallel.mesh import batch_sharding, on_mesh, replicated
from jaxgen.storage import Path
from jaxgen.text import TextEncoder
from jaxgen.train.config import RunConfig
from jaxgen.train.logging import Log
from jaxgen.train.state import SAMPLE, TrainState, stream
from jaxgen.train.step import to_float, with_features, with_floats


def evaluate(
    config: RunConfig, state: TrainState, frozen: Any, encoder: TextEncoder, held_out: Source | None, ready: Any, mesh: Any
) -> dict[str, float]:
    """Scores of the EMA weights on `validation`."""
    scores: dict[str, float] = {}
    if held_out is not None:
        size = config.train.batch_size
        feed = batches(
            held_out,
            seed=0,
            batch_size=size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        losses = []
        score = jax.jit(on_mesh(mesh, lambda *inputs: loss_of(config, *inputs, encoder)))
        for k in range(max(config.eval.count // size, 1)):
            local = ready(next(feed))
            batch = jax.tree.map(lambda x: jax.make_array_from_process_local_data(batch_sharding(mesh), x), local)
            losses.append(score({**state.params, **state.ema_params}, frozen, batch, stream(config.seed, k, SAMPLE)))
        scores["eval/loss"] = float(np.mean(jax.device_get(losses)))
    model = Model(config, state.ema_params, encoder, frozen, mesh)
    if held_out is not None and config.eval.diversity and config.family.draws:
        captions = list(dict.fromkeys(held_out.captions()))
        chosen = np.linspace(0, len(captions) - 1, min(config.eval.diversity, len(captions))).astype(int)
        scores["eval/diversity"] = diversity(model, [captions[i] for i in chosen])
    if config.data.name == "scenes":
        from jaxgen.data.scenes import example, render
        from jaxgen.evaluate.accuracy import accuracy, score

        language = "en" if "en" in config.data.languages else config.data.languages[0]
        if config.family.draws:
            scores |= accuracy(model, "validation", config.eval.count, language=language)
        else:
            side = config.data.image_size
            scenes = [example("validation", k, size=side)[0] for k in range(config.eval.count)]
            originals = np.stack([render(scene, side) for scene in scenes])
            scores |= score(reconstruct(config, state, frozen, originals, mesh), scenes)[0]
    if config.eval.metric not in scores:
        raise UserError(f"eval.metric={config.eval.metric}: this data set has {', '.join(scores)}")
    return scores


def loss_of(config: RunConfig, params: Any, frozen: Any, batch: Any, key: jax.Array, encoder: TextEncoder) -> jax.Array:
    batch = with_features(batch, params, frozen, config.text.adapt, encoder.apply)
    batch = with_floats(batch)
    losses = config.family.losses(params, frozen, batch, key)
    return jnp.sum(jnp.stack([loss for loss, _ in losses.values()]))


def reconstruct(config: RunConfig, state: TrainState, frozen: Any, images: np.ndarray, mesh: Any) -> np.ndarray:
    """uint8 [N, H, W, 3]: what the EMA weights make of pictures of that shape."""
    run = jax.jit(
        on_mesh(mesh, lambda params, frozen, images: to_uint8(config.family.roundtrip(params, frozen, to_float(images)))),
        out_shardings=replicated(mesh),
    )
    size = config.train.batch_size
    place = batch_sharding(mesh)
    parts = []
    for start in range(0, len(images), size):
        some = np.resize(images[start : start + size], (size, *images.shape[1:]))  # filled up with its first: one program
        spread = jax.make_array_from_callback(some.shape, place, lambda index, some=some: some[index])
        parts.append(np.asarray(run(state.ema_params, frozen, spread)))
    return np.concatenate(parts)[: len(images)]


def keep_best(control: dict[str, Any], config: RunConfig, scores: dict[str, float]) -> None:
    """Patience: a new best starts the count anew; when it runs out the run is stopped."""
    value = config.eval.score(scores)
    if control["best"] is None or value > control["best"]:
        control["best"], control["waited"] = value, 0
    else:
        control["waited"] += 1
        control["stopped"] = 0 < config.eval.patience <= control["waited"]


def draw(
    config: RunConfig,
    state: TrainState,
    frozen: Any,
    encoder: TextEncoder,
    mesh: Any,
    step: int,
    workdir: Path,
    log: Log,
    source: Source,
) -> None:
    """A captioned sheet of the configured prompts into samples/; of a family that does not draw, pictures of `source` and
    below them their reconstructions."""
    columns = None
    if config.family.draws:
        model = Model(config, state.ema_params, encoder, frozen, mesh, step)
        images = model.sample(config.sample.prompts, num_images=config.sample.num_images)
        captions = [prompt for prompt in config.sample.prompts for _ in range(config.sample.num_images)]
    else:
        columns = min(len(source), 8)
        shown = [source[k] for k in range(columns)]
        originals = np.stack([fit(image, source.size, source.size) for image, _ in shown])
        images = np.concatenate([originals, reconstruct(config, state, frozen, originals, mesh)])
        captions = [captions[0] for _, captions in shown] + [""] * columns
    if jax.process_index() == 0:
        page = sheet(list(images), captions, columns)
        try:
            save_png(workdir / "samples" / f"step_{step:07d}.png", page, {"step": str(step)})
        except NoSpace as error:
            print(f"warning: samples not written: {error}", file=sys.stderr, flush=True)
        log.image(step, "samples", page)
