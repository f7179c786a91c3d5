"""Diffusers' AutoencoderKL: every case of references/ against what diffusers computes, and its files both ways."""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxgen.errors import UserError
from jaxgen.families.autoencoder_kl import CONFIG, WEIGHTS, AutoencoderKL
from jaxgen.families.codec import Pretrained
from tests.families.cases import NAMES, REFERENCES, SIZE, config, pictures, random_tensor


@functools.cache
def stored(name):
    with np.load(REFERENCES / f"{name}.npz") as file:
        return dict(file)


def tensors(name):
    return {t: random_tensor(t, tuple(shape)) for t, shape in json.loads(str(stored(name)["tensors"])).items()}


def write(directory, name, change=lambda flat: flat, **values):
    """A Hugging Face directory of a case; `change` its tensors, `values` its config."""
    directory.mkdir(exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(json.loads(str(stored(name)["config"])) | values))
    save_file(change(tensors(name)), directory / WEIGHTS, metadata={"format": "pt"})
    return directory


def read(directory):
    section = Pretrained(str(directory)).resolve()
    return section.codec, section.load()


@functools.cache
def loaded(name):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as place:
        return read(write(Path(place) / "model", name))


def error(a, b):
    return np.abs(np.asarray(a) - b).max() / np.abs(b).max()


@pytest.mark.parametrize("name", NAMES)
def test_it_computes_what_diffusers_computes(name):
    codec, params = loaded(name)
    reference = stored(name)
    image = pictures(codec.in_channels).transpose(0, 2, 3, 1)

    @jax.jit
    def run(params, image):
        latent = codec.encode(params, image)
        return codec.moments(params, image), latent, codec.decode(params, latent)

    (mean, log), latent, decoded = run(params, image)
    plain = {key: reference[key].transpose(0, 2, 3, 1) for key in ("mean", "log", "decoded")}
    assert error(mean, plain["mean"]) < 1e-4
    assert error(log, plain["log"]) < 1e-4
    # `decode` undoes what `encode` scales, so this is diffusers' decode(mean).
    assert error(decoded, plain["decoded"]) < 1e-4
    values = config(name)
    shift = np.array(values.get("latents_mean", values.get("shift_factor", 0.0)))
    scale = values.get("scaling_factor", 0.18215) / np.array(values.get("latents_std", 1.0))
    assert error(latent, (plain["mean"] - shift) * scale) < 1e-4
    assert codec.latent_shape((SIZE, SIZE, codec.in_channels)) == latent.shape[1:]


def test_a_draw_is_the_posteriors():
    codec, params = loaded("kl_flux")
    image = pictures(3).transpose(0, 2, 3, 1)
    key = jax.random.key(3)
    drawn = jax.jit(codec.encode)(params, image, key)
    plain = {k: stored("kl_flux")[k].transpose(0, 2, 3, 1) for k in ("mean", "log")}
    noise = np.asarray(jax.random.normal(key, drawn.shape))
    assert error(drawn, (plain["mean"] + np.exp(0.5 * plain["log"]) * noise - 0.1159) * 0.3611) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_files_come_back_bit_for_bit(tmp_path, name):
    codec, params = loaded(name)
    codec.save(tmp_path / "out", params)
    ours, theirs = load_file(tmp_path / "out" / WEIGHTS), tensors(name)
    assert ours.keys() == theirs.keys()
    for tensor in ours:
        np.testing.assert_array_equal(ours[tensor], theirs[tensor], err_msg=tensor)
    again, values = json.loads((tmp_path / "out" / CONFIG).read_text()), json.loads(str(stored(name)["config"]))
    del values["_diffusers_version"], values["sample_size"], values["force_upcast"]
    assert again == values
    assert read(tmp_path / "out")[0] == codec


def renamed(flat, window=()):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    out = {}
    for name, value in flat.items():
        for new, before in old.items():
            if f"attentions.0.{new}." in name:
                name = name.replace(new, before)
                value = value.reshape(*value.shape, *window) if value.ndim == 2 else value
        out[name] = value
    return out


@pytest.mark.parametrize("window", [(), (1, 1)], ids=["linear", "convolution"])
def test_attention_under_its_old_names_is_the_same(tmp_path, window):
    codec, params = loaded("kl_sd")
    again, others = read(write(tmp_path / "old", "kl_sd", lambda flat: renamed(flat, window)))
    assert again == codec
    jax.tree.map(np.testing.assert_array_equal, params, others)


def without(flat):
    del flat["decoder.up_blocks.1.resnets.0.conv1.bias"]
    return flat


BROKEN = {
    "missing": (without, r"tensor decoder.up_blocks.1.resnets.0.conv1.bias is missing"),
    "surplus": (lambda f: f | {"encoder.more": np.zeros(2, np.float32)}, r"tensor encoder.more .*surplus"),
    "shape": (
        lambda f: f | {"encoder.conv_in.weight": np.zeros((8, 3, 3, 2), np.float32)},
        r"encoder.conv_in.weight has shape \[8, 3, 3, 2\] and config.json asks for \[8, 3, 3, 3\]",
    ),
    "a window where none belongs": (
        lambda f: f | {"encoder.conv_in.bias": np.zeros((8, 1, 1), np.float32)},
        r"encoder.conv_in.bias has shape",
    ),
    "not finite": (lambda f: f | {"quant_conv.bias": np.full(8, np.inf, np.float32)}, "quant_conv.bias holds NaN or infinity"),
    "integers": (lambda f: f | {"quant_conv.bias": np.zeros(8, np.int32)}, "quant_conv.bias is I32"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_told_by_name(tmp_path, change, message):
    with pytest.raises(UserError, match=message) as caught:
        read(write(tmp_path / "model", "kl_sdxl", change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "is of a AutoencoderTiny"),
        ({"act_fn": "relu"}, "act_fn=relu is not of this network"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "down_block_types=AttnDownEncoderBlock2D"),
        ({"norm_num_groups": 3}, "width 8 is no multiple of norm_num_groups=3"),
        ({"norm_num_groups": 0}, "norm_num_groups=0 is no number of 1 or more"),
        ({"block_out_channels": []}, "is no list of widths"),
        ({"scaling_factor": None}, "scaling_factor=None is no positive number"),
        ({"latents_mean": [1.0]}, "latents_mean has 1 entries for latent_channels=4"),
    ],
)
def test_what_this_network_has_not_is_told(tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path / "model", "kl_sdxl", **values))


def test_pictures_that_do_not_fit_are_told():
    codec = AutoencoderKL(block_out_channels=(32, 32, 32))
    with pytest.raises(UserError, match=r"data.image_size=30 is no multiple of 4"):
        codec.check_image((30, 30, 3))
    with pytest.raises(UserError, match="3 channels, not of 1"):
        codec.check_image((32, 32, 1))
    with pytest.raises(UserError, match="no tokens"):
        _ = Pretrained("somewhere", codec).vocab
