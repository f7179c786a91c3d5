"""The one training step: gradients, accumulation, clipping, optimizers, EMA and the guard against non-finite numbers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxgen.families.base import Family
from jaxgen.nn.module import Params
from jaxgen.text.adapt import TEXT, Adaptation, Frozen, text_of
from jaxgen.text.features import TextFeatures
from jaxgen.train.state import LOSS, TrainState, stream

Batch = dict[str, Any]
Step = Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, jax.Array]]]


def make_step(
    family: Family,
    optimizers: dict[str, optax.GradientTransformation],
    *,
    seed: int,
    ema_decay: float = 0.999,
    accumulate: int = 1,
    compute_dtype: Any = jnp.float32,
    encode: Callable[[Params, jax.Array, jax.Array], TextFeatures] | None = None,
    adapt: Adaptation | None = None,
) -> Step:
    """step(state, frozen, batch) -> (state, metrics), pure, to be jitted with the state donated.

    batch: "image" uint8 [B, H, W, C], or what the family precomputes of it, and either "text" (TextFeatures of B captions) or
    "input_ids" and "attention_mask" int32 [B, T], which `encode(frozen["text"], ids, mask)` turns into features; with an
    adaptation that trains anything, inside the loss, so that the gradient reaches it.
    A step whose loss or gradient is not finite changes nothing, and neither does any step after it; its number stands
    in state.control["failed"]. Metrics are float32 scalars."""

    adapt = adapt or Frozen()

    def losses(group: str, trained: Params, rest: Params, frozen: Params, batch: Batch, key: jax.Array):
        params = {**rest, group: trained}
        batch = with_features(batch, params, frozen, adapt, encode)
        loss, metrics = family.losses(_cast(params, compute_dtype), frozen, batch, key)[group]
        penalty = adapt.penalty(text_of({group: trained}))
        if penalty is not None:
            loss, metrics = loss + penalty, {**metrics, "text_penalty": penalty}
        return loss.astype(jnp.float32), metrics

    def gradients(group: str, params: Params, frozen: Params, batches: Batch, keys: jax.Array):
        """Mean loss, metrics and gradient of one group over the micro-batches (leading axis of `batches`)."""

        def one(batch: Batch, key: jax.Array):
            (loss, metrics), grads = jax.value_and_grad(losses, argnums=1, has_aux=True)(
                group, params[group], params, frozen, batch, key
            )
            return {"loss": loss, **metrics}, grads

        if accumulate == 1:
            return one(jax.tree.map(lambda x: x[0], batches), keys[0])
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, *_first(batches, keys)))
        add = lambda total, x: jax.tree.map(lambda a, b: a + b / accumulate, total, one(*x))  # noqa: E731
        return jax.lax.scan(lambda total, x: (add(total, x), None), zero, (batches, keys))[0]

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = stream(seed, state.step, LOSS)
        if isinstance(adapt, Frozen):  # once for all groups and micro-batches
            batch = with_features(batch, {}, frozen, adapt, encode)
        batches = jax.tree.map(lambda x: _split(x, accumulate), with_floats(batch))
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(accumulate))
        params, opt_state, metrics, norms = dict(state.params), dict(state.opt_state), {}, []
        for group in family.groups:  # a later group's loss sees the groups updated before it
            values, grads = gradients(group, params, frozen, batches, keys)
            norms.append(optax.tree.norm(grads))
            updates, opt_state[group] = optimizers[group].update(grads, opt_state[group], params[group])
            params[group] = optax.apply_updates(params[group], updates)
            metrics |= values if len(state.params) == 1 else {f"{group}/{name}": v for name, v in values.items()}
        if len(state.params) > 1:
            metrics["loss"] = sum(metrics[f"{group}/loss"] for group in state.params)
        metrics["grad_norm"] = jnp.sqrt(sum(jnp.square(norm) for norm in norms))
        # The average follows fast at first, so that short runs are not held back by their first weights.
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = {
            group: jax.tree.map(lambda e, p, share=1.0 - decay: e + share * (p - e), old, params[group])
            for group, old in state.ema_params.items()
        }
        for group in ema:
            if TEXT in ema[group]:
                ema[group] = {**ema[group], TEXT: adapt.averaged(ema[group][TEXT], params[group][TEXT])}
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        failed = state.control["failed"]
        good = finite & (failed < 0)
        new = TrainState(state.step + 1, params, ema, opt_state, state.control)
        new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
        control = {**state.control, "failed": jnp.where((failed < 0) & ~finite, state.step, failed)}
        metrics["failed"] = control["failed"]
        return TrainState(new.step, new.params, new.ema_params, new.opt_state, control), metrics

    return step


def to_float(image: jax.Array) -> jax.Array:
    """uint8 -> float32 in [-1, 1], as families take pictures."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def with_floats(batch: Batch) -> Batch:
    """The batch with its pictures, if it has them, as families take them."""
    return {**batch, "image": to_float(batch["image"])} if "image" in batch else batch


def with_features(batch: Batch, params: Params, frozen: Params, adapt: Adaptation, encode: Any) -> Batch:
    """The batch with "text" in its token ids' place, read by the encoder, if there is one, as `params` have adapted it."""
    if "text" in batch or encode is None:
        return batch
    text = encode(adapt.merge(frozen["text"], text_of(params)), batch["input_ids"], batch["attention_mask"])
    return {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")} | {"text": text}


def _split(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...] by strides, so that every device keeps its share of each part."""
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def _first(batches: Batch, keys: jax.Array) -> tuple[Batch, jax.Array]:
    return jax.tree.map(lambda x: x[0], batches), keys[0]


def _cast(params: Params, dtype: Any) -> Params:
    return jax.tree.map(lambda p: p.astype(dtype), params)
