"""Hugging Face's AutoencoderKL, the first stage of Stable Diffusion, SDXL, SD 3 and FLUX (arXiv 2112.10752), from its files
and back: pictures at an eighth of their size in 4 or 16 channels. It is used here, not trained."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgen.config import register
from jaxgen.errors import UserError
from jaxgen.families.codec import Codec, Image, draw
from jaxgen.nn.attention import attend
from jaxgen.nn.layers import Conv, Linear, ones, zeros
from jaxgen.nn.module import Params, bind, flatten, init_params, param
from jaxgen.storage import as_path, write_json
from jaxgen.text import weights
from jaxgen.text.weights import Table, Tensor, linear, norm

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
EPS = 1e-6  # of every norm
MIN_LOG, MAX_LOG = -30.0, 20.0  # of the posterior's variance
# Names of the attention's maps in files from before diffusers 0.17.
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@register("autoencoder_kl")
@dataclass(frozen=True)
class AutoencoderKL(Codec):
    """The fields of its config.json; the defaults are diffusers': files leave out what equals them."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None  # a channel each, beside scaling_factor
    latents_std: tuple[float, ...] | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @classmethod
    def from_hf(cls, values: dict[str, Any], where: str) -> "AutoencoderKL":
        """From the values of the file `where`. Raises UserError for another class, a block or an activation that this network
        has not, and for values that are no sizes."""
        if values.get("_class_name") != "AutoencoderKL":
            raise UserError(
                f"{where} is of a {values.get('_class_name')}; of diffusers' autoencoders only AutoencoderKL is read"
            )
        known = {
            "act_fn": {"silu", "swish"},
            "down_block_types": {"DownEncoderBlock2D"},
            "up_block_types": {"UpDecoderBlock2D"},
        }
        for name, allowed in known.items():
            value = values.get(name, ())
            unknown = sorted(set(map(str, [value] if isinstance(value, str) else value)) - allowed)
            if unknown:
                raise UserError(f"{where}: {name}={unknown[0]} is not of this network, which has {', '.join(sorted(allowed))}")
        chosen: dict[str, Any] = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        chosen |= {name: tuple(value) for name, value in chosen.items() if isinstance(value, list)}
        config = cls(**chosen)
        sizes = {n: getattr(config, n) for n in ("in_channels", "out_channels", "layers_per_block", "latent_channels")}
        sizes |= {"norm_num_groups": config.norm_num_groups}
        for name, value in sizes.items():
            if type(value) is not int or value < 1:
                raise UserError(f"{where}: {name}={value} is no number of 1 or more")
        blocks = config.block_out_channels
        if not isinstance(blocks, tuple) or not blocks or not all(type(b) is int and b > 0 for b in blocks):
            raise UserError(f"{where}: block_out_channels={blocks} is no list of widths")
        uneven = [width for width in blocks if width % config.norm_num_groups]
        if uneven:
            raise UserError(f"{where}: width {uneven[0]} is no multiple of norm_num_groups={config.norm_num_groups}")
        if not isinstance(config.scaling_factor, int | float) or config.scaling_factor <= 0:
            raise UserError(f"{where}: scaling_factor={config.scaling_factor} is no positive number")
        for name in ("latents_mean", "latents_std"):
            value = getattr(config, name)
            if value is not None and len(value) != config.latent_channels:
                raise UserError(f"{where}: {name} has {len(value)} entries for latent_channels={config.latent_channels}")
        return config

    def load(self, source: Path) -> Params:
        """float32 parameters from a directory's safetensors. Raises UserError naming the file or tensor that is wrong."""
        file = source / WEIGHTS
        shapes = {name: leaf.shape for name, leaf in flatten(jax.eval_shape(lambda: self.init(jax.random.key(0))))}
        return weights.load(file if file.exists() else source, self.tensors(), shapes)

    def save(self, directory: Path, params: Params) -> None:
        """A directory that diffusers loads, and `load` to the same bits."""
        directory.mkdir(parents=True, exist_ok=True)
        values = {"_class_name": "AutoencoderKL", "act_fn": "silu"} | asdict(self)
        for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            values[name] = [kind] * len(self.block_out_channels)
        weights.save(directory / WEIGHTS, params, self.tensors())
        write_json(as_path(directory) / CONFIG, values)

    @property
    def factor(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)

    def check_image(self, image: Image) -> None:
        if image[0] % self.factor or image[1] % self.factor:
            raise UserError(
                f"data.image_size={image[0]} is no multiple of {self.factor}, by which the autoencoder shrinks pictures"
            )
        if image[2] != self.in_channels:
            raise UserError(f"the autoencoder reads pictures of {self.in_channels} channels, not of {image[2]}")

    def latent_shape(self, image: Image) -> Image:
        return image[0] // self.factor, image[1] // self.factor, self.latent_channels

    def init(self, key: jax.Array, image: Image | None = None) -> Params:
        return init_params(self.build, key)

    def build(self, rngs: nnx.Rngs) -> "_AutoencoderKL":
        return _AutoencoderKL(self, rngs)

    def encode(self, params: Params, image: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return draw(*self.posterior(params, image), key)

    def posterior(self, params: Params, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, log = self.moments(params, image)
        shift, scale = self._statistics
        return (mean - shift) / scale, jnp.exp(0.5 * log) / scale

    def moments(self, params: Params, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(mean, log of the variance) float32 [B, h, w, c], as the files' own scale has them."""
        found = bind(self.build, params).encode(image.astype(jnp.float32))
        mean, log = jnp.split(found, 2, axis=-1)
        return mean, jnp.clip(log, MIN_LOG, MAX_LOG)

    def decode(self, params: Params, latent: jax.Array) -> jax.Array:
        shift, scale = self._statistics
        return bind(self.build, params).decode(latent.astype(jnp.float32) * scale + shift)

    @property
    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of latents, as the files state them."""
        mean = self.latents_mean if self.latents_mean is not None else self.shift_factor or 0.0
        return np.asarray(mean, np.float32), np.asarray(self.latents_std or 1.0, np.float32) / np.float32(self.scaling_factor)

    def tensors(self) -> Table:
        """Our flat name -> theirs."""
        table: dict[str, Tensor] = {}
        levels = len(self.block_out_channels)
        for half, blocks, count in (("encoder", "down_blocks", 0), ("decoder", "up_blocks", 1)):
            table |= linear(f"{half}.conv_in", f"{half}.conv_in") | linear(f"{half}.conv_out", f"{half}.conv_out")
            table |= norm(f"{half}.norm_out", f"{half}.conv_norm_out")
            for j in range(2):
                table |= _resnet(f"{half}.mid.{j}", f"{half}.mid_block.resnets.{j}")
            if self.mid_block_add_attention:
                table |= _attention(f"{half}.attention", f"{half}.mid_block.attentions.0")
            widths = self.block_out_channels if half == "encoder" else self.block_out_channels[::-1]
            before = widths[0]
            for i, width in enumerate(widths):
                for j in range(self.layers_per_block + count):
                    shortcut = j == 0 and before != width
                    table |= _resnet(f"{half}.blocks.{i}.{j}", f"{half}.{blocks}.{i}.resnets.{j}", shortcut)
                if i + 1 < levels:
                    sampler = "downsamplers" if half == "encoder" else "upsamplers"
                    table |= linear(f"{half}.between.{i}", f"{half}.{blocks}.{i}.{sampler}.0.conv")
                before = width
        table |= linear("quant_conv", "quant_conv") if self.use_quant_conv else {}
        return table | (linear("post_quant_conv", "post_quant_conv") if self.use_post_quant_conv else {})


def _resnet(ours: str, theirs: str, shortcut: bool = False) -> dict[str, Tensor]:
    table: dict[str, Tensor] = {}
    for i in (1, 2):
        table |= norm(f"{ours}.norm{i}", f"{theirs}.norm{i}") | linear(f"{ours}.conv{i}", f"{theirs}.conv{i}")
    return table | (linear(f"{ours}.shortcut", f"{theirs}.conv_shortcut") if shortcut else {})


def _attention(ours: str, theirs: str) -> dict[str, Tensor]:
    table = norm(f"{ours}.norm", f"{theirs}.group_norm")
    for mine, its in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0")):
        for name, kind, turned in (("kernel", "weight", True), ("bias", "bias", False)):
            old = f"{theirs}.{OLD[its]}.{kind}"
            table[f"{ours}.{mine}.{name}"] = Tensor(f"{theirs}.{its}.{kind}", turned, alias=old, pointwise=turned)
    return table


class _AutoencoderKL(nnx.Module):
    def __init__(self, c: AutoencoderKL, rngs: nnx.Rngs):
        latent = c.latent_channels
        self.encoder = _Half(c, c.block_out_channels, c.layers_per_block, c.in_channels, 2 * latent, _Down, rngs)
        self.decoder = _Half(c, c.block_out_channels[::-1], c.layers_per_block + 1, latent, c.out_channels, _Up, rngs)
        self.quant_conv = Conv(2 * latent, 2 * latent, rngs, size=1) if c.use_quant_conv else None
        self.post_quant_conv = Conv(latent, latent, rngs, size=1) if c.use_post_quant_conv else None

    def encode(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> mean and log of the variance side by side [B, h, w, 2c]."""
        half = self.encoder
        x = half.finish(half.middle(half.levels(half.conv_in(x))))
        return x if self.quant_conv is None else self.quant_conv(x)

    def decode(self, z: jax.Array) -> jax.Array:
        """[B, h, w, c] -> [B, H, W, C]."""
        half = self.decoder
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        return half.finish(half.levels(half.middle(half.conv_in(z))))


class _Half(nnx.Module):
    """Encoder or decoder: levels of residual blocks with a change of resolution `between` them, and the blocks of the lowest
    resolution in the middle, after the levels or before."""

    def __init__(
        self, c: AutoencoderKL, widths: tuple[int, ...], count: int, din: int, dout: int, between: Any, rngs: nnx.Rngs
    ):
        groups, low = c.norm_num_groups, c.block_out_channels[-1]
        self.conv_in, self.conv_out = Conv(din, widths[0], rngs), Conv(widths[-1], dout, rngs)
        self.norm_out = GroupNorm(widths[-1], groups, rngs)
        self.mid = nnx.List([_Resnet(low, low, groups, rngs) for _ in range(2)])
        self.attention = _Attention(low, groups, rngs) if c.mid_block_add_attention else None
        pairs = list(zip((widths[0], *widths), widths, strict=False))
        self.blocks = nnx.List([nnx.List([_Resnet(b if j else a, b, groups, rngs) for j in range(count)]) for a, b in pairs])
        self.between = nnx.List([between(width, width, rngs) for width in widths[:-1]])

    def levels(self, x: jax.Array) -> jax.Array:
        for i, blocks in enumerate(self.blocks):
            for block in blocks:
                x = block(x)
            x = self.between[i](x) if i < len(self.between) else x
        return x

    def middle(self, x: jax.Array) -> jax.Array:
        x = self.mid[0](x)
        return self.mid[1](x if self.attention is None else self.attention(x))

    def finish(self, x: jax.Array) -> jax.Array:
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class GroupNorm(nnx.Module):
    """Each of `groups` equal parts of the channels to zero mean and unit variance over all positions (arXiv 1803.08494)."""

    def __init__(self, dim: int, groups: int, rngs: nnx.Rngs):
        self.scale, self.bias = param(ones, rngs, (dim,), (None,)), param(zeros, rngs, (dim,), (None,))
        self.groups = groups

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32).reshape(*x.shape[:-1], self.groups, -1)
        centred = wide - wide.mean((1, 2, 4), keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.square(centred).mean((1, 2, 4), keepdims=True) + EPS)
        return (y.reshape(x.shape) * self.scale[...] + self.bias[...]).astype(x.dtype)


class _Resnet(nnx.Module):
    def __init__(self, din: int, dout: int, groups: int, rngs: nnx.Rngs):
        self.norm1, self.norm2 = GroupNorm(din, groups, rngs), GroupNorm(dout, groups, rngs)
        self.conv1, self.conv2 = Conv(din, dout, rngs), Conv(dout, dout, rngs)
        self.shortcut = Conv(din, dout, rngs, size=1) if din != dout else None

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv2(jax.nn.silu(self.norm2(self.conv1(jax.nn.silu(self.norm1(x))))))
        return h + (x if self.shortcut is None else self.shortcut(x))


class _Attention(nnx.Module):
    """One head over all positions."""

    def __init__(self, dim: int, groups: int, rngs: nnx.Rngs):
        self.norm = GroupNorm(dim, groups, rngs)
        self.q, self.k, self.v, self.out = (Linear(dim, dim, rngs, axes=("embed", None)) for _ in range(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        flat = self.norm(x).reshape(b, 1, h * w, c)
        return x + self.out(attend(self.q(flat), self.k(flat), self.v(flat))).reshape(x.shape)


class _Down(Conv):
    """Halves the resolution, with the padding at the end alone, as the files' weights expect it."""

    def __call__(self, x: jax.Array) -> jax.Array:
        sides = ((0, 1), (0, 1))
        y = jax.lax.conv_general_dilated(x, self.kernel[...], (2, 2), sides, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + self.bias[...]


class _Up(Conv):
    """Doubles the resolution by repeating pixels, then convolves."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x.repeat(2, axis=1).repeat(2, axis=2))
