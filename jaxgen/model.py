"""A trained model: load it, draw with it, export it.

An exported directory (and a shipped model) holds config.json, model.safetensors with the EMA weights, and README.md."""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxgen import config as configs
from jaxgen.errors import UserError
from jaxgen.families.base import SampleSettings, Shapes
from jaxgen.nn.module import Params, flatten, unflatten
from jaxgen.parallel.runtime import compute_dtype
from jaxgen.storage import Path, as_path, read_json, write_bytes, write_json, write_text
from jaxgen.text import TextEncoder, load_text_encoder
from jaxgen.text.adapt import adapted, text_of, with_text
from jaxgen.train.config import RunConfig

FORMAT = 1
BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # pictures a call, so that few programs are compiled


class Model:
    """Weights, text encoder and configuration, ready to draw.

    mesh: where `params` lie; by default all local devices draw, each a share of the pictures."""

    def __init__(
        self, config: RunConfig, params: Params, encoder: TextEncoder, mesh: jax.sharding.Mesh | None = None, step: int = 0
    ):
        self.config, self.step = config, step
        self.encoder = adapted(encoder, config.text.adapt, text_of(params))
        self.image = (config.data.image_size, config.data.image_size, 3)
        if mesh is None:
            mesh = jax.sharding.Mesh(np.array(jax.local_devices()).reshape(-1, 1), ("data", "fsdp"))
            dtype = compute_dtype(config.train.compute_dtype)
            params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
            params = jax.jit(lambda tree: jax.tree.map(lambda p: p.astype(dtype), tree))(params)
        self.params, self.mesh = params, mesh

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
        sampler: str | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> np.ndarray:
        """uint8 [len(prompts) * num_images, H, W, 3], prompt by prompt; settings left out are the configuration's.

        A picture depends on (weights, prompt, settings, seed, its prompt's index, its own index) alone."""
        if isinstance(prompts, str):
            prompts = [prompts]
        if num_images < 1 or not prompts:
            raise UserError("give at least one prompt and one image")
        chosen = self.settings(seed, guidance_scale, num_steps, sampler, guidance_interval)
        low, high = chosen["guidance_interval"]
        settings = SampleSettings(
            image=self.image,
            sampler=chosen["sampler"],
            num_steps=jnp.int32(chosen["num_steps"]),
            guidance_scale=jnp.float32(chosen["guidance_scale"]),
            guidance_low=jnp.float32(low),
            guidance_high=jnp.float32(high),
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
            out.append(np.asarray(self._draw(self.params, *inputs, jnp.uint32(seed), settings)))
        return np.concatenate(out)[: len(jobs)]

    def settings(
        self,
        seed: int = 0,
        guidance_scale: float | None = None,
        num_steps: int | None = None,
        sampler: str | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> dict[str, Any]:
        """The settings a drawing is made with: those given, the configuration's for the rest."""
        given = {
            "guidance_scale": guidance_scale,
            "num_steps": num_steps,
            "sampler": sampler,
            "guidance_interval": guidance_interval,
        }
        chosen: dict[str, Any] = {k: getattr(self.config.sample, k) if v is None else v for k, v in given.items()}
        if chosen["num_steps"] < 1:
            raise UserError(f"num_steps={chosen['num_steps']} must be at least 1")
        return {"seed": seed, **chosen}

    def _encode(self, prompts: Sequence[str]) -> Any:
        """TextFeatures of numpy arrays, a row a prompt."""
        tokens = self.encoder.tokenize(prompts)
        parts = []
        for rows in _bucketed(np.arange(len(prompts))):
            features = self.encoder(tokens["input_ids"][rows], tokens["attention_mask"][rows])
            parts.append(jax.tree.map(np.asarray, features))
        return jax.tree.map(lambda *several: np.concatenate(several), *parts)

    @cached_property
    def _draw(self) -> Any:
        family = self.config.family

        def draw(params, text, null_text, prompt_index, image_index, seed, settings):
            def fold(prompt, image):
                return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt), image)

            keys = jax.vmap(fold)(prompt_index, image_index)
            return family.sample(params, {}, text, null_text, keys, settings)

        return jax.jit(draw, out_shardings=NamedSharding(self.mesh, PartitionSpec()))


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
    directory = as_path(name_or_path)
    if not directory.is_dir():
        directory = as_path(str(resources.files("jaxgen") / "models" / name_or_path))
        if "/" in name_or_path or not (directory / "config.json").exists():
            raise UserError(f"{name_or_path}: no such directory or shipped model; shipped are {', '.join(shipped()) or 'none'}")
    if not (directory / "config.json").exists():
        raise UserError(f"{directory} has no config.json: it is neither a workdir nor an exported model")
    values = read_json(directory / "config.json")
    exported = values.pop("exported", None)
    config = configs.finalize(configs.from_dict(RunConfig, values, f"{directory}/config.json"))
    encoder = load_text_encoder(config.text.source, max_length=config.text.max_length)
    shapes = Shapes((config.data.image_size, config.data.image_size, 3), encoder.hidden_size, encoder.pooled_size)
    abstract = jax.eval_shape(lambda base: _init(config, shapes, base, encoder.pretrained), encoder.params)
    if exported is not None:
        params, meta = _read_weights(directory / "model.safetensors", abstract), exported
    else:
        params, meta = _read_checkpoint(directory, abstract)
    if meta["text_fingerprint"] != encoder.fingerprint:
        raise UserError(
            f"{directory} was trained with other text encoder files than {config.text.source} has here "
            f"({meta['text_fingerprint'][:12]} there, {encoder.fingerprint[:12]} here): restore those"
        )
    return Model(config, params, encoder, step=meta["step"])


def shipped() -> list[str]:
    """The names of the models that come with the package."""
    root = resources.files("jaxgen") / "models"
    return sorted(p.name for p in root.iterdir() if (p / "config.json").is_file()) if root.is_dir() else []


def export(workdir: str, directory: str, *, dtype: str = "float16", note: str = "") -> None:
    """Write a workdir's newest EMA weights as an exported directory; `note` goes into its README.md."""
    from safetensors.numpy import save

    model, target = load(workdir), as_path(directory)
    flat = {name: np.asarray(leaf).astype(np.dtype(dtype)) for name, leaf in flatten(jax.device_get(model.params))}
    values = configs.to_dict(model.config)
    values["exported"] = {"format": FORMAT, "step": model.step, "text_fingerprint": model.encoder.fingerprint}
    write_bytes(target / "model.safetensors", save(flat))
    write_text(target / "README.md", _card(model, flat, dtype, directory, note))
    write_json(target / "config.json", values)  # last: without it the directory is no model


def read_weights(name_or_path: str) -> dict[str, np.ndarray]:
    """Flat float32 EMA weights of a workdir, an exported directory or a shipped model."""
    return {name: np.asarray(leaf, np.float32) for name, leaf in flatten(jax.device_get(load(name_or_path).params))}


def _init(config: RunConfig, shapes: Shapes, base: Params, pretrained: Any) -> Params:
    key, architecture = jax.random.key(0), pretrained and pretrained.architecture
    return with_text(config.family.init(key, shapes), config.text.adapt.init(key, base, architecture))


def _read_checkpoint(directory: Path, abstract: Params) -> tuple[Params, dict[str, Any]]:
    from jaxgen.parallel.runtime import require

    require(("orbax",), "train")
    from jaxgen.train.checkpoints import Checkpoints

    if not (directory / "checkpoints").is_dir():
        raise UserError(f"{directory} has no checkpoint yet")
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    found = Checkpoints(directory, keep=None).restore_ema(
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), abstract)
    )
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
