"""A trained model: load it, draw with it, export it.

An exported directory (and a shipped model) holds config.json, model.safetensors with the EMA weights, and README.md."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxgen import config as configs
from jaxgen.data.buckets import PARTS, nearest, shapes
from jaxgen.errors import UserError
from jaxgen.families.base import SampleSettings, Shapes, served
from jaxgen.nn.module import Params, fingerprint, flatten, unflatten
from jaxgen.parallel.mesh import on_mesh
from jaxgen.parallel.runtime import compute_dtype
from jaxgen.storage import Path, as_path, read_json, write_bytes, write_json, write_text
from jaxgen.text import TextEncoder
from jaxgen.text.adapt import adapted, text_of, with_text
from jaxgen.train.config import RunConfig

FORMAT = 1
FROZEN = "frozen"  # the group of an exported file that holds what is used and was not trained
BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # pictures a call, so that few programs are compiled


class Model:
    """Weights, text encoder and configuration, ready to draw.

    frozen: what the family uses and does not train. mesh: where `params` and `frozen` lie; by default all local devices
    draw, each a share of the pictures."""

    def __init__(
        self,
        config: RunConfig,
        params: Params,
        encoder: TextEncoder,
        frozen: Params | None = None,
        mesh: jax.sharding.Mesh | None = None,
        step: int = 0,
    ):
        self.config, self.step, frozen = config, step, frozen or {}
        self.encoder = adapted(encoder, config.text.adapt, text_of(params))
        self.image = (config.data.image_size, config.data.image_size, 3)
        if mesh is None:
            mesh = jax.sharding.Mesh(np.array(jax.local_devices()).reshape(-1, 1), ("data", "fsdp"))
            dtype = compute_dtype(config.train.compute_dtype)
            params, frozen = jax.device_put((params, frozen), NamedSharding(mesh, PartitionSpec()))
            params = jax.jit(lambda tree: jax.tree.map(lambda p: p.astype(dtype), tree))(params)
        self.params, self.frozen, self.mesh = params, frozen, mesh

    @property
    def shapes(self) -> Shapes:
        return Shapes(self.image, self.encoder.hidden_size, self.encoder.pooled_size)

    def sample(
        self,
        prompts: Sequence[str],
        *,
        num_images: int = 1,
        seed: int = 0,
        guidance_scale: float | None = None,
        num_steps: int | None = None,
        negative_prompt: str = "",
        **settings: Any,
    ) -> np.ndarray:
        """uint8 [len(prompts) * num_images, H, W, 3], prompt by prompt; settings left out are the configuration's.

        settings: sampler, guidance_interval, temperature, top_k, top_p, aspect_ratio, as SampleConfig has them; H and W are
        data.image_size, but for another ratio. A picture depends on
        (weights, prompt, settings, seed, its prompt's index, its own index) alone."""
        chosen = self.settings(seed, guidance_scale=guidance_scale, num_steps=num_steps, **settings)
        return self._run(self._draw, prompts, num_images, negative_prompt, chosen)

    def trace(
        self,
        prompts: Sequence[str],
        *,
        frames: int = 24,
        num_images: int = 1,
        seed: int = 0,
        negative_prompt: str = "",
        **settings: Any,
    ) -> np.ndarray:
        """uint8 [frames, len(prompts) * num_images, H, W, 3]: how the pictures of `sample` come about, step by step, token
        by token, or, where a picture is drawn at once, on a walk through the latents around it."""
        if frames < 1:
            raise UserError(f"frames={frames} must be at least 1")
        trace = lambda *inputs: self._trace(*inputs, frames).swapaxes(0, 1)  # noqa: E731
        pictures = self._run(trace, prompts, num_images, negative_prompt, self.settings(seed, **settings))
        return pictures.swapaxes(0, 1)

    def settings(self, seed: int = 0, **given: Any) -> dict[str, Any]:
        """The settings a drawing is made with: those given and not None, the configuration's for the rest."""
        names = ("guidance_scale", "num_steps", "sampler", "guidance_interval", "temperature", "top_k", "top_p", "aspect_ratio")
        unknown = sorted(given.keys() - set(names))
        if unknown:
            raise TypeError(f"unknown setting {unknown[0]!r}: one of {', '.join(names)}")
        chosen = {k: getattr(self.config.sample, k) if given.get(k) is None else given[k] for k in names}
        samplers = self.config.family.samplers
        chosen["sampler"] = chosen["sampler"] or samplers[0]
        if chosen["sampler"] not in samplers:
            raise UserError(f"unknown sampler {chosen['sampler']!r}: this model has {', '.join(samplers)}")
        if chosen["num_steps"] < 1:
            raise UserError(f"num_steps={chosen['num_steps']} must be at least 1")
        if chosen["temperature"] < 0 or chosen["top_k"] < 0 or not 0 < chosen["top_p"] <= 1:
            raise UserError(
                f"temperature={chosen['temperature']} and top_k={chosen['top_k']} cannot be negative, "
                f"top_p={chosen['top_p']} must lie in (0, 1]"
            )
        if chosen["aspect_ratio"] <= 0:
            raise UserError(f"aspect_ratio={chosen['aspect_ratio']} is width over height: give a positive number")
        return {"seed": seed, **chosen}

    def _run(
        self, draw: Any, prompts: Sequence[str], num_images: int, negative_prompt: str, chosen: dict[str, Any]
    ) -> np.ndarray:
        """The pictures of every prompt from `draw`, called with few different numbers of rows."""
        if isinstance(prompts, str):
            prompts = [prompts]
        if num_images < 1 or not prompts:
            raise UserError("give at least one prompt and one image")
        low, high = chosen["guidance_interval"]
        settings = SampleSettings(
            image=self._shape(chosen["aspect_ratio"]),
            sampler=chosen["sampler"],
            num_steps=jnp.int32(chosen["num_steps"]),
            guidance_scale=jnp.float32(chosen["guidance_scale"]),
            guidance_low=jnp.float32(low),
            guidance_high=jnp.float32(high),
            temperature=jnp.float32(chosen["temperature"]),
            top_k=jnp.int32(chosen["top_k"]),
            top_p=jnp.float32(chosen["top_p"]),
        )
        unique = list(dict.fromkeys([*prompts, negative_prompt]))
        text = self._encode(unique)
        row = {prompt: i for i, prompt in enumerate(unique)}
        jobs = np.array([(row[p], i, k) for i, p in enumerate(prompts) for k in range(num_images)], np.int32)
        shares = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        place = NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))

        def spread(a: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(a.shape, place, lambda index: a[index])

        out = []
        for some in _bucketed(jobs, shares):
            null = np.full(len(some), row[negative_prompt])
            inputs = (
                jax.tree.map(lambda a, rows=some[:, 0]: a[rows], text),
                jax.tree.map(lambda a, rows=null: a[rows], text),
                some[:, 1],
                some[:, 2],
            )
            inputs = jax.tree.map(spread, inputs)
            out.append(np.asarray(draw(self.params, self.frozen, *inputs, jnp.uint32(chosen["seed"]), settings)))
        return np.concatenate(out)[: len(jobs)]

    def _shape(self, ratio: float) -> tuple[int, int, int]:
        """(H, W, C) of pictures `ratio` times as wide as high, as nearly as the network can."""
        if ratio == 1:
            return self.image
        among = served(self.config.family, self.shapes, shapes(self.image[0], PARTS))
        return (*among[int(nearest(np.array([[1.0, ratio]]), among)[0])], self.image[2])

    def _encode(self, prompts: Sequence[str]) -> Any:
        """TextFeatures of numpy arrays, a row a prompt."""
        tokens = self.encoder.tokenize(prompts)
        parts = []
        for rows in _bucketed(np.arange(len(prompts))):
            features = self.encoder(tokens["input_ids"][rows], tokens["attention_mask"][rows])
            parts.append(jax.tree.map(np.asarray, features))
        return jax.tree.map(lambda *several: np.concatenate(several), *parts)

    def _draw(self, *inputs: Any) -> jax.Array:
        return _compiled(self.config.family, "sample", self.mesh)(*inputs)

    def _trace(self, *inputs: Any) -> jax.Array:
        return _compiled(self.config.family, "trace", self.mesh)(*inputs)


@lru_cache(maxsize=8)
def _compiled(family: Any, method: str, mesh: jax.sharding.Mesh) -> Any:
    """A family's way to draw, shared by all models of it: while training each evaluation and each sheet makes a new one."""

    def draw(params, frozen, text, null_text, prompt_index, image_index, seed, settings, *rest):
        def fold(prompt, image):
            return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt), image)

        keys = jax.vmap(fold)(prompt_index, image_index)
        return getattr(family, method)(params, frozen, text, null_text, keys, settings, *rest)

    static = (8,) if method == "trace" else ()  # the number of frames
    return jax.jit(on_mesh(mesh, draw), out_shardings=NamedSharding(mesh, PartitionSpec()), static_argnums=static)


def _bucketed(rows: np.ndarray, shares: int = 1) -> Iterator[np.ndarray]:
    """Rows in parts whose lengths are few numbers, each divisible by `shares`; the last part is filled up with its first."""
    start = 0
    while start < len(rows):
        left = len(rows) - start
        size = shares * next((b for b in BUCKETS if b * shares >= min(left, BUCKETS[-1])), BUCKETS[-1])
        some = rows[start : start + size]
        yield np.concatenate([some, np.repeat(some[:1], size - len(some), axis=0)])
        start += size


def load(name_or_path: str) -> Model:
    """A model from a workdir (its newest checkpoint's EMA weights), an exported directory, or a shipped name.

    Raises UserError where there is none, or its files are broken or do not belong together."""
    config, params, encoder, frozen, step = _read(name_or_path)
    return Model(config, params, encoder, frozen, step=step)


def _read(name_or_path: str) -> tuple[RunConfig, Params, TextEncoder, Params, int]:
    """What a Model is made of; the weights as they were written, whatever this device computes in."""
    directory, config, exported = read_config(name_or_path)
    encoder = config.text.load()
    shapes = config.shapes(encoder)
    abstract = jax.eval_shape(lambda base: _init(config, shapes, base, encoder.pretrained), encoder.params)
    if exported is not None:
        like = {**abstract, FROZEN: jax.eval_shape(lambda: config.family.init_frozen(shapes))}
        params, meta = _read_weights(directory / "model.safetensors", like), exported
        frozen = params.pop(FROZEN, {})
    else:
        params, meta = _read_checkpoint(directory, abstract)
        frozen = config.family.load_frozen()
        check_frozen(config, frozen, meta, str(directory))
    if meta["text_fingerprint"] != encoder.fingerprint:
        raise UserError(
            f"{directory} was trained with other text encoder files than {config.text.source} has here "
            f"({meta['text_fingerprint'][:12]} there, {encoder.fingerprint[:12]} here): restore those"
        )
    return config, params, encoder, frozen, meta["step"]


def read_config(name_or_path: str) -> tuple[Path, RunConfig, dict[str, Any] | None]:
    """(directory, configuration, what an exported one says of itself or None) of what `load` takes. Raises UserError."""
    directory = as_path(name_or_path)
    if not directory.is_dir():
        directory = as_path(str(resources.files("jaxgen") / "models" / name_or_path))
        if "/" in name_or_path or not (directory / "config.json").exists():
            raise UserError(f"{name_or_path}: no such directory or shipped model; shipped are {', '.join(shipped()) or 'none'}")
    if not (directory / "config.json").exists():
        raise UserError(f"{directory} has no config.json: it is neither a workdir nor an exported model")
    values = read_json(directory / "config.json")
    exported = values.pop("exported", None)
    if "family" not in values:
        raise UserError(f"{directory} is a language model's: give {directory}/model to sample.py --expand; it draws nothing")
    config = configs.finalize(configs.from_dict(RunConfig, values, f"{directory}/config.json"))
    config = dataclasses.replace(config, family=config.family.to_draw())
    if exported is not None and exported.get("format") != FORMAT:
        raise UserError(
            f"{directory} is of format {exported.get('format')}, this jaxgen reads {FORMAT}: install the one that wrote it"
        )
    return directory, config, exported


def read_trained(name_or_path: str) -> tuple[RunConfig, Params]:
    """Configuration and EMA weights, float32, of what was trained on pictures alone; its text encoder is not looked for.

    Raises UserError as `load` does."""
    directory, config, exported = read_config(name_or_path)
    shapes = Shapes((config.data.image_size, config.data.image_size, 3), 0, 0)
    abstract = jax.eval_shape(lambda: config.family.init(jax.random.key(0), shapes))
    abstract = {group: abstract[group] for group in config.family.drawn}
    if exported is not None:
        return config, _read_weights(directory / "model.safetensors", abstract)
    return config, jax.device_get(_read_checkpoint(directory, abstract)[0])


def fingerprints(config: RunConfig, frozen: Params) -> dict[str, str]:
    """{part: SHA-256 of its weights} of what the family reads from the files that its field `part` names."""
    return {part: fingerprint(tree) for part, tree in frozen.items() if hasattr(config.family, part)}


def check_frozen(config: RunConfig, frozen: Params, meta: dict[str, Any], where: str) -> None:
    """Raises UserError where a part of `frozen` is not what a checkpoint's `meta` says it was trained with."""
    known = meta.get("frozen_fingerprint", {})
    for part, found in fingerprints(config, frozen).items():
        if known.get(part, found) != found:
            raise UserError(
                f"{where} was trained with other weights than family.{part} names now ({known[part][:12]} there, {found[:12]} "
                "here): restore those, or choose another --workdir"
            )


def shipped() -> list[str]:
    """The names of the models that come with the package."""
    root = resources.files("jaxgen") / "models"
    return sorted(p.name for p in root.iterdir() if (p / "config.json").is_file()) if root.is_dir() else []


def export(workdir: str, directory: str, *, dtype: str = "float16", note: str = "") -> None:
    """Write a workdir's newest EMA weights as an exported directory; `note` goes into its README.md."""
    from safetensors.numpy import save

    model, target = load(workdir), as_path(directory)
    tree = jax.device_get({**model.params, FROZEN: model.frozen})
    flat = {name: np.asarray(leaf).astype(np.dtype(dtype)) for name, leaf in flatten(tree)}
    values = configs.to_dict(model.config)
    values["exported"] = {"format": FORMAT, "step": model.step, "text_fingerprint": model.encoder.fingerprint}
    write_bytes(target / "model.safetensors", save(flat))
    write_text(target / "README.md", _card(model, flat, dtype, directory, note))
    write_json(target / "config.json", values)  # last: without it the directory is no model


def read_weights(name_or_path: str) -> dict[str, np.ndarray]:
    """Flat float32 weights of a workdir, an exported directory or a shipped model: the EMA of what draws, and of a workdir
    also what was trained beside it (a discriminator), as it was at the end."""
    directory, config, exported = read_config(name_or_path)
    params = _read(name_or_path)[1]
    if exported is None and set(config.family.groups) != set(config.family.drawn):
        params = _read_newest(directory, lambda checkpoints: checkpoints.restore_params())[0] | params
    return {name: np.asarray(leaf, np.float32) for name, leaf in flatten(jax.device_get(params))}


def _init(config: RunConfig, shapes: Shapes, base: Params, pretrained: Any) -> Params:
    """What is drawn with, fresh."""
    key, architecture, family = jax.random.key(0), pretrained and pretrained.architecture, config.family
    params = family.init(key, shapes)
    params = {group: params[group] for group in family.drawn}
    return with_text(params, config.text.adapt.init(key, base, architecture), family.drawn[0])


def _read_checkpoint(directory: Path, abstract: Params) -> tuple[Params, dict[str, Any]]:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), abstract)
    return _read_newest(directory, lambda checkpoints: checkpoints.restore_ema(abstract))


def _read_newest(directory: Path, read: Callable[[Any], Any]) -> Any:
    """What `read` finds among the checkpoints (Checkpoints) of a workdir."""
    from jaxgen.parallel.runtime import require

    require(("orbax",), "train")
    from jaxgen.train.checkpoints import Checkpoints

    found = read(Checkpoints(directory, keep=None)) if (directory / "checkpoints").is_dir() else None
    if found is None:
        raise UserError(f"{directory} has no checkpoint yet")
    return found


def _read_weights(file: Path, abstract: Params) -> Params:
    from safetensors import SafetensorError
    from safetensors.numpy import load as parse

    try:
        flat = parse(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file} is missing") from None
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{file} is no whole safetensors file ({error}); export or download it again") from None
    wanted = dict(flatten(abstract))
    for name in sorted(wanted.keys() | flat.keys()):
        if name not in flat or name not in wanted:
            raise UserError(f"{file}: tensor {name} is {'missing' if name in wanted else 'surplus'}: not of this config.json")
        if flat[name].shape != wanted[name].shape:
            raise UserError(f"{file}: tensor {name} has shape {flat[name].shape}, config.json asks for {wanted[name].shape}")
        if not np.isfinite(flat[name]).all():
            raise UserError(f"{file}: tensor {name} holds NaN or infinity")
    return unflatten({name: leaf.astype(np.float32) for name, leaf in flat.items()})


def _card(model: Model, flat: dict[str, np.ndarray], dtype: str, name: str, note: str) -> str:
    count = sum(leaf.size for leaf in flat.values())
    config = json.dumps(configs.to_dict(model.config), indent=2)
    return (
        f"# A jaxgen model\n\n{note}\n\n"
        f"{count / 1e6:.2f} million parameters in {dtype}, EMA weights of step {model.step}.\n\n"
        f'```python\nimport jaxgen\n\nmodel = jaxgen.load("{name}")\n'
        f'images = model.sample(["a caption"], num_images=4)\n```\n\n'
        f"Text encoder: {model.config.text.source}. Trained with:\n\n```json\n{config}\n```\n"
    )
