"""What is looked at while training: scores on `validation`, and sheets of pictures."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgen.data.pipeline import Source, batches
from jaxgen.data.recipe import fit
from jaxgen.data.scenes import example, render
from jaxgen.errors import NoSpace, UserError
from jaxgen.evaluate import accuracy
from jaxgen.evaluate.diversity import diversity
from jaxgen.evaluate.pictures import save_png, sheet
from jaxgen.families.base import to_uint8
from jaxgen.model import Model
from jaxgen.nn.module import Params
from jaxgen.parallel.mesh import batch_sharding, on_mesh, replicated
from jaxgen.storage import Path
from jaxgen.text import TextEncoder
from jaxgen.train.config import RunConfig
from jaxgen.train.logging import Log
from jaxgen.train.state import SAMPLE, TrainState, stream
from jaxgen.train.step import to_float, with_features, with_floats


def diverse(config: RunConfig) -> bool:
    return config.eval.diversity > 0 and config.family.draws


def judged(config: RunConfig) -> bool:
    return config.data.name == "scenes"


def scores_of(config: RunConfig) -> list[str]:
    """The names of the scores that a run's evaluations will have."""
    names = ["eval/loss", *(["eval/diversity"] if diverse(config) else [])]
    return [*names, *(accuracy.NAMES if judged(config) else [])]


def check_metric(config: RunConfig, names: Iterable[str]) -> None:
    """Raises UserError where eval.metric is none of the scores."""
    if config.eval.metric not in names:
        raise UserError(f"eval.metric={config.eval.metric}: this data set has {', '.join(names)}")


@dataclass
class Evaluator:
    """Looks at the EMA weights of a run's states, by programs that are compiled once.

    source: what is scored, and shown where the family does not draw. ready: batch -> what travels to the device."""

    config: RunConfig
    workdir: Path
    encoder: TextEncoder
    frozen: Params
    mesh: Mesh
    source: Source
    ready: Callable[[dict[str, Any]], dict[str, Any]]

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """The scores of a state. Raises UserError where eval.metric is none of them, as few pictures may lack its kind."""
        config, scores = self.config, {"eval/loss": self._loss_of(state)}
        model = Model(config, state.ema_params, self.encoder, self.frozen, self.mesh)
        if diverse(config):
            captions = list(dict.fromkeys(self.source.captions()))
            chosen = np.linspace(0, len(captions) - 1, min(config.eval.diversity, len(captions))).astype(int)
            scores["eval/diversity"] = diversity(model, [captions[i] for i in chosen])
        if judged(config) and config.family.draws:
            language = "en" if "en" in config.data.languages else config.data.languages[0]
            scores |= accuracy.accuracy(model, "validation", config.eval.count, language=language)
        elif judged(config):
            side = config.data.image_size
            scenes = [example("validation", k, size=side)[0] for k in range(config.eval.count)]
            originals = np.stack([render(scene, side) for scene in scenes])
            scores |= accuracy.score(self.reconstruct(state, originals), scenes)[0]
        check_metric(config, scores)
        return scores

    def _loss_of(self, state: TrainState) -> float:
        """Mean over the first eval.count pictures, with the same noise each time."""
        size = self.config.train.batch_size
        feed = batches(
            self.source, seed=0, batch_size=size, process_index=jax.process_index(), process_count=jax.process_count()
        )
        losses = []
        for k in range(max(self.config.eval.count // size, 1)):
            local = self.ready(next(feed))
            batch = jax.tree.map(lambda x: jax.make_array_from_process_local_data(batch_sharding(self.mesh), x), local)
            params = {**state.params, **state.ema_params}
            losses.append(self._loss(params, self.frozen, batch, stream(self.config.seed, k, SAMPLE)))
        return float(np.mean(jax.device_get(losses)))

    @cached_property
    def _loss(self) -> Any:
        """(params, frozen, batch, key) -> the sum of the groups' losses."""
        config, encoder = self.config, self.encoder

        def loss(params: Params, frozen: Params, batch: Any, key: jax.Array) -> jax.Array:
            batch = with_floats(with_features(batch, params, frozen, config.text.adapt, encoder.apply))
            losses = config.family.losses(params, frozen, batch, key)
            return jnp.sum(jnp.stack([loss for loss, _ in losses.values()]))

        return jax.jit(on_mesh(self.mesh, loss))

    @cached_property
    def _roundtrip(self) -> Any:
        """(params, frozen, images) -> uint8 [B, H, W, 3] on every device."""
        family = self.config.family

        def roundtrip(params: Params, frozen: Params, images: jax.Array) -> jax.Array:
            return to_uint8(family.roundtrip(params, frozen, to_float(images)))

        return jax.jit(on_mesh(self.mesh, roundtrip), out_shardings=replicated(self.mesh))

    def reconstruct(self, state: TrainState, images: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, 3]: what the EMA weights make of pictures of that shape."""
        size, place = self.config.train.batch_size, batch_sharding(self.mesh)
        parts = []
        for start in range(0, len(images), size):
            some = np.resize(images[start : start + size], (size, *images.shape[1:]))  # filled up with its first: one program
            spread = jax.make_array_from_callback(some.shape, place, lambda index, some=some: some[index])
            parts.append(np.asarray(self._roundtrip(state.ema_params, self.frozen, spread)))
        return np.concatenate(parts)[: len(images)]

    def draw(self, state: TrainState, step: int, log: Log) -> None:
        """A captioned sheet of the configured prompts into samples/; of a family that does not draw, pictures of `source` and
        below them their reconstructions."""
        config, columns = self.config, None
        if config.family.draws:
            model = Model(config, state.ema_params, self.encoder, self.frozen, self.mesh, step)
            images = model.sample(config.sample.prompts, num_images=config.sample.num_images)
            captions = [prompt for prompt in config.sample.prompts for _ in range(config.sample.num_images)]
        else:
            size, columns = self.source.size, min(len(self.source), 8)
            shown = [self.source[k] for k in range(columns)]
            originals = np.stack([fit(image, size, size) for image, _ in shown])
            images = np.concatenate([originals, self.reconstruct(state, originals)])
            captions = [captions[0] for _, captions in shown] + [""] * columns
        if jax.process_index() == 0:
            page = sheet(list(images), captions, columns)
            try:
                save_png(self.workdir / "samples" / f"step_{step:07d}.png", page, {"step": str(step)})
            except NoSpace as error:
                print(f"warning: samples not written: {error}", file=sys.stderr, flush=True)
            log.image(step, "samples", page)


def keep_best(control: dict[str, Any], config: RunConfig, scores: dict[str, float]) -> None:
    """Patience: a new best starts the count anew; when it runs out the run is stopped."""
    value = config.eval.score(scores)
    if control["best"] is None or value > control["best"]:
        control["best"], control["waited"] = value, 0
    else:
        control["waited"] += 1
        control["stopped"] = 0 < config.eval.patience <= control["waited"]
