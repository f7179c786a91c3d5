"""Flow in latents: losses, drawing and tracing through a codec; latents kept in files; a run upon another run."""

import dataclasses
import functools
import json
import logging
import os
import signal
import sys
from itertools import islice

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxgen
from jaxgen.data.config import DataConfig
from jaxgen.data.pipeline import Source, batches
from jaxgen.data.precompute import check_size, digest, precompute
from jaxgen.errors import UserError
from jaxgen.families.autoencoder import KL, Autoencoder, Convolutional
from jaxgen.families.base import SampleSettings, Shapes
from jaxgen.families.codec import Pretrained
from jaxgen.families.flow import Flow
from jaxgen.families.unet import UNet
from jaxgen.model import check_frozen, export, fingerprints
from jaxgen.nn.module import flatten, unflatten
from jaxgen.parallel.mesh import MeshConfig
from jaxgen.storage import as_path
from jaxgen.text.config import TextConfig
from jaxgen.train.config import EvalConfig, OptimizerConfig, RunConfig, SampleConfig, TrainConfig
from jaxgen.train.loop import run
from jaxgen.train.loop import seen as seen_by_step
from jaxgen.train.step import to_float, with_floats
from jaxgen.train.workdir import claim
from tests.families.test_flow import Oracle, text
from tests.train.test_start import small_encoder

SHAPES = Shapes((16, 16, 3), 12, 10)
CODEC = Convolutional(widths=(8,), encoder_blocks=1, decoder_blocks=1, bottleneck=KL(channels=5))  # latents [8, 8, 5]
NETWORK = UNet(patch=2, widths=(8,), down=(1,), up=(0,), head_dim=8, attention=("none",), refiner=0)
FLOW = Flow(network=NETWORK, codec=Pretrained("somewhere", CODEC))


@functools.cache
def frozen():
    """A codec whose every weight is random."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: CODEC.init(jax.random.key(0), SHAPES.image))
    flat = {name: 0.3 * rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in flatten(shapes)}
    return {"codec": unflatten(flat)}


def oracle(clean):
    """A flow whose network knows the clean latent."""
    return dataclasses.replace(FLOW, network=Oracle(clean)), {"generator": {"unused": jnp.zeros(())}}


def test_a_perfect_prediction_is_the_decoded_latent():
    clean = 2.0 * jax.random.normal(jax.random.key(1), (8, 8, 5))  # far outside [-1, 1], which only pixels are clipped to
    family, params = oracle(clean)
    settings = SampleSettings(image=SHAPES.image, sampler="euler", num_steps=3)
    keys = jax.random.split(jax.random.key(0), 2)
    words = dataclasses.replace(text(2), pooled=jnp.ones((2, 10)))
    frames = jax.jit(lambda frozen: family.trace(params, frozen, words, words, keys, settings, 3))(frozen())
    drawn = jax.jit(lambda frozen: family.sample(params, frozen, words, words, keys, settings))(frozen())
    decoded = jax.jit(CODEC.decode)(frozen()["codec"], clean[None])[0]
    expected = np.round((np.clip(np.asarray(decoded), -1, 1) + 1) * 127.5)
    assert expected.std() > 10
    assert frames.shape == (3, 2, *SHAPES.image)
    for picture in (*drawn, *frames.reshape(6, *SHAPES.image)):
        assert np.abs(np.asarray(picture, int) - expected).max() <= 1


def test_the_path_leads_from_a_draw_of_the_latents():
    image = jax.random.uniform(jax.random.key(2), (4, *SHAPES.image), minval=-1, maxval=1)
    mean, deviation = jax.jit(CODEC.posterior)(frozen()["codec"], image)
    family, params = oracle(lambda x, t: x)  # predicts what it sees, so that the loss tells x_t
    key = jax.random.key(3)
    losses = jax.jit(lambda frozen, image: family.losses(params, frozen, {"image": image, "text": text()}, key)["generator"])
    found, metrics = losses(frozen(), image)
    time_key, noise_key, _ = jax.random.split(key, 3)
    draw = np.asarray(jax.random.normal(jax.random.fold_in(key, 10), mean.shape), np.float64)
    latent = np.asarray(mean) + np.asarray(deviation) * draw
    t = np.asarray(family.draw_times(time_key, 4), np.float64)[:, None, None, None]
    noise = np.asarray(jax.random.normal(noise_key, mean.shape), np.float64)
    error = (((1 - t) * latent + t * noise - latent) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(metrics["clean_mse"], error.mean(), rtol=1e-4)
    np.testing.assert_allclose(found, (error / np.maximum(t[:, 0, 0, 0], 0.2) ** 2).mean(), rtol=1e-4)


def test_the_network_is_of_the_latents_size():
    params = jax.eval_shape(lambda: FLOW.init(jax.random.key(0), SHAPES))
    assert params["generator"]["stem"]["kernel"].shape == (3, 3, 4 * 5, 8)
    assert params["generator"]["head"]["kernel"].shape == (3, 3, 8, 4 * 5)
    axes = FLOW.logical_axes(SHAPES)
    assert axes["generator"]["stem"]["kernel"] == (None, None, "in_channels", "channels")
    inner = SHAPES._replace(image=(8, 8, 5))
    assert FLOW.flops(SHAPES, 6) == NETWORK.flops(inner, 6)
    shapes = jax.eval_shape(lambda: FLOW.init_frozen(SHAPES))
    assert jax.tree.map(lambda a: a.shape, shapes) == jax.tree.map(lambda a: a.shape, frozen())
    with pytest.raises(UserError, match=r"data.image_size=15 is no multiple of 2, by which the autoencoder"):
        FLOW.init(jax.random.key(0), Shapes((15, 15, 3), 1, 1))
    with pytest.raises(
        UserError, match=r"latents of 7 x 7, which it sees as the picture: data.image_size=7 is no multiple of 2"
    ):
        FLOW.init(jax.random.key(0), Shapes((14, 14, 3), 1, 1))


# Latents in files


class Records:
    def __init__(self, count=6, size=16, broken=()):
        rng = np.random.default_rng(1)
        pictures = rng.integers(0, 256, (count, size, size, 3), np.uint8)
        self.rows = [(cv2.imencode(".png", p)[1].tobytes(), [f"caption {i}"], "") for i, p in enumerate(pictures)]
        for index in broken:
            self.rows[index] = (b"no picture", *self.rows[index][1:])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def captions(self):
        return [self[index][1] for index in range(len(self))]


def make(frozen, image):
    return FLOW.precompute(frozen, to_float(image))


def source(config, flip=True, **settings):
    return Source(config, Records(**settings), flip=flip)


@pytest.fixture
def config(tmp_path):
    return DataConfig(image_size=16, train_examples=6, dir=str(tmp_path))


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float16, 2e-3)])
def test_losses_from_files_are_those_of_pictures(config, dtype, tolerance):
    seen, kept = source(config), source(config)
    kept.made = precompute(config, kept, make, frozen(), {"codec": 1}, dtype=dtype)
    kinds = {name: (rows.shape, rows.dtype) for name, rows in kept.made.items()}
    assert kinds == dict.fromkeys(("latent", "deviation"), ((6, 2, 8, 8, 5), dtype))
    params = {"generator": {"unused": jnp.zeros(())}}
    family = dataclasses.replace(FLOW, network=Oracle(lambda x, t: x))

    @jax.jit
    def loss(frozen, batch):
        return family.losses(params, frozen, {**with_floats(batch), "text": text()}, jax.random.key(5))["generator"][0]

    for ours, theirs in islice(zip(batches(kept, seed=2, batch_size=4), batches(seen, seed=2, batch_size=4), strict=True), 3):
        assert ours["caption"] == theirs["caption"]
        assert ours.keys() == {"latent", "deviation", "caption"}
        ours, theirs = seen_by_step(ours), seen_by_step(theirs)
        np.testing.assert_allclose(loss(frozen(), ours), loss(frozen(), theirs), rtol=tolerance)


def test_files_are_read_where_they_are_whole_and_made_anew_where_not(config, tmp_path):
    rows = lambda: precompute(config, source(config), make, frozen(), {"codec": 1})  # noqa: E731
    first = rows()
    [directory] = (tmp_path / "latents").iterdir()
    assert sorted(p.name for p in directory.iterdir()) == ["deviation.npy", "key.json", "latent.npy"]
    file, key = directory / "latent.npy", (directory / "key.json").read_bytes()
    whole = file.read_bytes()
    np.save(file, first["latent"] + 1)  # as another process may have written it
    np.testing.assert_array_equal(rows()["latent"], first["latent"] + 1)
    (directory / "key.json").unlink()  # a kill before the end
    np.testing.assert_array_equal(rows()["latent"], first["latent"])
    assert (file.read_bytes(), (directory / "key.json").read_bytes()) == (whole, key)
    for damaged in (whole[:200], b""):
        file.write_bytes(damaged)
        np.testing.assert_array_equal(rows()["latent"], first["latent"])
    np.save(file, first["latent"][:3])
    np.testing.assert_array_equal(rows()["latent"], first["latent"])


def test_the_key_holds_all_that_rows_hang_on(config):
    arguments = {"source": source(config), "key": {"weights": "a"}, "split": "train", "dtype": np.float16}
    name = lambda config=config, **change: digest(config, **{**arguments, **change})  # noqa: E731
    larger = dataclasses.replace(config, image_size=24)
    names = [
        name(),
        name(key={"weights": "b"}),
        name(split="validation"),
        name(dtype=np.float32),
        name(source=source(config, flip=False)),
        name(source=source(config, count=7)),
        name(config=larger, source=source(larger)),
        name(config=dataclasses.replace(config, train_examples=7)),
    ]
    assert len(set(names)) == len(names)
    assert name() == names[0]


def test_rows_that_cannot_be_kept_are_refused_with_the_other_way(config, monkeypatch):
    mend = r"inside the step, with --config.data.precompute=False"
    cropped = Source(config, Records(size=18), crop=True)
    with pytest.raises(UserError, match=f"cropped at random.*{mend}"):
        precompute(config, cropped, make, frozen(), {})
    with pytest.raises(UserError, match=f"1 pictures of scenes cannot be read.*{mend}"):
        precompute(dataclasses.replace(config, keep_in_memory=0), source(config, broken=(3,)), make, frozen(), {})
    monkeypatch.setattr("jaxgen.data.precompute.host_memory", lambda: 1000)
    with pytest.raises(UserError, match=f"15 kB, more than 50% of this host's 1000 B.*{mend}|more than 50%.*{mend}"):
        precompute(config, source(config), make, frozen(), {})
    monkeypatch.setattr("jaxgen.data.precompute.host_memory", lambda: 10**15)
    with pytest.raises(UserError, match=f"10.0 TB.*left.*{mend}"):
        check_size(10**13, as_path(config.dir) / "latents" / "new")


def test_large_values_and_tokens_keep_their_kind(config):
    def other(frozen, image):
        mean = image.astype(jnp.float32).mean((1, 2, 3))
        return {"large": 1e4 * mean, "tokens": jnp.round(mean).astype(jnp.int32)}

    rows = precompute(config, source(config, flip=False), other, {}, {})
    means = np.stack([source(config)[i][0].mean() for i in range(6)])
    assert {name: (value.shape, value.dtype) for name, value in rows.items()} == {
        "large": ((6, 1), np.float32),
        "tokens": ((6, 1), np.int32),
    }
    np.testing.assert_allclose(rows["large"][:, 0], 1e4 * means, rtol=1e-5)
    assert precompute(config, source(config), lambda frozen, image: {}, {}, {}) is None


def test_other_frozen_weights_are_refused():
    config = RunConfig(family=FLOW)
    marks = fingerprints(config, frozen())
    other = {"codec": {**frozen()["codec"], "shift": frozen()["codec"]["shift"] + 1}}
    check_frozen(config, frozen(), {"frozen_fingerprint": marks}, "here")
    check_frozen(config, other, {}, "here")  # a checkpoint from before there were any
    with pytest.raises(UserError, match=r"here was trained with other weights than family.codec names now") as caught:
        check_frozen(config, other, {"frozen_fingerprint": marks}, "here")
    assert "\n" not in str(caught.value)


# A run upon another


def configuration(place, family, **settings):
    return RunConfig(
        family=family,
        data=DataConfig(image_size=16, train_examples=16, dir=str(place / "data")),
        text=TextConfig(source=str(place / "encoder")),
        mesh=MeshConfig(data=1),
        train=TrainConfig(steps=2, batch_size=4, log_every=1, checkpoint_every=100),
        optimizer=OptimizerConfig(schedule="constant", warmup_steps=0),
        **settings,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """runs/autoencoder, exported as codec/, and runs/flow in its latents."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    hook, levels = sys.unraisablehook, {name: logging.getLogger(name).level for name in ("absl", "asyncio")}
    place, before = tmp_path_factory.mktemp("runs"), os.getcwd()
    os.chdir(place)
    small_encoder(place / "encoder")
    try:
        judged = EvalConfig(every=2, count=4, metric="eval/exact")
        run(configuration(place, Autoencoder(network=CODEC), eval=judged), as_path("runs/autoencoder"))
        export("runs/autoencoder", "codec", dtype="float32")
        run(flow(place), as_path("runs/flow"))
        yield place
    finally:
        os.chdir(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def flow(place, source="codec"):
    return configuration(place, Flow(network=NETWORK, codec=Pretrained(source)), sample=SampleConfig(num_steps=2))


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_an_autoencoder_is_judged_by_its_reconstructions(place):
    workdir = place / "runs" / "autoencoder"
    [scores] = [line for line in lines(workdir) if "eval/exact" in line]
    assert scores["eval/exact"] == 0.0  # after two steps
    assert scores["eval/loss"] > 0
    assert (workdir / "samples" / "step_0000002.png").exists()


def test_a_run_and_its_export_are_the_same_codec(place):
    run_, exported = (Pretrained(name).resolve() for name in ("runs/autoencoder", "codec"))
    assert run_.codec == exported.codec == CODEC
    jax.tree.map(np.testing.assert_array_equal, run_.load(), exported.load())
    with pytest.raises(UserError, match=r"family.codec.source=codec is not the autoencoder of this run any more"):
        Pretrained("codec", dataclasses.replace(CODEC, patch=4)).load()
    with pytest.raises(UserError, match=r"family.codec.source=runs/flow holds a model of the family flow"):
        Pretrained("runs/flow").resolve()


def test_a_flow_draws_in_the_latents_of_that_codec(place):
    assert [line["step"] for line in lines(place / "runs" / "flow") if "loss" in line] == [1, 2]
    [rows] = (place / "data" / "latents").iterdir()
    assert np.load(rows / "latent.npy").shape == (16, 1, 8, 8, 5)
    export("runs/flow", "exported", dtype="float32")
    model = jaxgen.load("exported")
    assert model.config.family.codec == Pretrained("codec", CODEC)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(model.frozen["codec"]), Pretrained("codec").load())
    words, keys = text(2), jax.random.split(jax.random.key(0), 2)
    wide = jax.tree.map(lambda a, width: jnp.zeros((*a.shape[:-1], width)), (words.hidden, words.pooled), model.shapes[1:])
    words = dataclasses.replace(words, hidden=wide[0], pooled=wide[1])
    draw = lambda params, frozen: model.config.family.sample(params, frozen, words, words, keys, SampleSettings(model.image))  # noqa: E731
    assert jax.eval_shape(draw, model.params, model.frozen).shape == (2, 16, 16, 3)


def test_other_weights_in_the_codecs_place_are_refused(place):
    file = place / "codec" / "model.safetensors"
    whole = file.read_bytes()
    changed = load_file(file)
    changed["generator.shift"] = changed["generator.shift"] + 1
    save_file(changed, file)
    for call in (lambda: jaxgen.load("runs/flow"), lambda: run(flow(place), as_path("runs/flow"))):
        with pytest.raises(UserError, match=r"runs/flow was trained with other weights than family.codec names now"):
            call()
    file.write_bytes(whole)
    os.rename("codec", "moved")  # the right ones, elsewhere
    moved = flow(place, "moved")
    claim(as_path("runs/flow"), dataclasses.replace(moved, family=moved.family.resolve()))
