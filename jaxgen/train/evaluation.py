"""What is looked at while training: scores on `validation`, and sheets of pictures."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.data.pipeline import Source, batches
from jaxgen.errors import UserError
from jaxgen.evaluate.pictures import save_png, sheet
from jaxgen.model import Model
from jaxgen.parallel.mesh import batch_sharding
from jaxgen.storage import Path
from jaxgen.text import TextEncoder
from jaxgen.train.config import RunConfig
from jaxgen.train.logging import Log
from jaxgen.train.state import SAMPLE, TrainState, stream
from jaxgen.train.step import to_float, with_features


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
        score = jax.jit(lambda params, frozen, batch, key: loss_of(config, params, frozen, batch, key, encoder))
        for k in range(max(config.eval.count // size, 1)):
            local = ready(next(feed))
            batch = jax.tree.map(lambda x: jax.make_array_from_process_local_data(batch_sharding(mesh), x), local)
            losses.append(score({**state.params, **state.ema_params}, frozen, batch, stream(config.seed, k, SAMPLE)))
        scores["eval/loss"] = float(np.mean(jax.device_get(losses)))
    if config.data.name == "scenes":
        from jaxgen.evaluate.accuracy import accuracy

        language = "en" if "en" in config.data.languages else config.data.languages[0]
        model = Model(config, state.ema_params, encoder, frozen, mesh)
        scores |= accuracy(model, "validation", config.eval.count, language=language)
    if config.eval.metric not in scores:
        raise UserError(f"eval.metric={config.eval.metric}: this data set has {', '.join(scores)}")
    return scores


def loss_of(config: RunConfig, params: Any, frozen: Any, batch: Any, key: jax.Array, encoder: TextEncoder) -> jax.Array:
    batch = with_features(batch, params, frozen, config.text.adapt, encoder.apply)
    batch = {**batch, "image": to_float(batch["image"])}
    losses = config.family.losses(params, frozen, batch, key)
    return jnp.sum(jnp.stack([loss for loss, _ in losses.values()]))


def keep_best(control: dict[str, Any], config: RunConfig, scores: dict[str, float]) -> None:
    """Patience: a new best starts the count anew; when it runs out the run is stopped."""
    value = config.eval.score(scores)
    if control["best"] is None or value > control["best"]:
        control["best"], control["waited"] = value, 0
    else:
        control["waited"] += 1
        control["stopped"] = 0 < config.eval.patience <= control["waited"]


def draw(
    config: RunConfig, state: TrainState, frozen: Any, encoder: TextEncoder, mesh: Any, step: int, workdir: Path, log: Log
) -> None:
    """A captioned sheet of the configured prompts into samples/."""
    model = Model(config, state.ema_params, encoder, frozen, mesh, step)
    images = model.sample(config.sample.prompts, num_images=config.sample.num_images)
    if jax.process_index() == 0:
        captions = [prompt for prompt in config.sample.prompts for _ in range(config.sample.num_images)]
        page = sheet(list(images), captions)
        save_png(workdir / "samples" / f"step_{step:07d}.png", page, {"step": str(step)})
        log.image(step, "samples", page)
