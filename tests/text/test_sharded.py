"""Pretrained weights over a mesh: each device's slices and no others, the same numbers as whole."""

import json
import os
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxgen.errors import UserError
from jaxgen.nn.module import flatten, init_params, logical_axes
from jaxgen.parallel.mesh import MeshConfig, make_mesh, param_shardings
from jaxgen.text import load_text_encoder, weights
from jaxgen.text.bert import BertConfig
from jaxgen.text.encoder import load_pretrained
from jaxgen.text.sources import resolve
from jaxgen.text.weights import Tensor
from tests.text.cases import random_tensor

CONFIG = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)]  # data, fsdp, tensor
CAPTIONS = ["a small red circle", "two dogs", "a large blue square to the left of a small green ring"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    target = tmp_path_factory.mktemp("bert")
    config = BertConfig.from_hf(CONFIG, "")
    abstract = jax.eval_shape(lambda: init_params(config.build, jax.random.key(0)))
    ours = {name: random_tensor(name, leaf.shape) for name, leaf in flatten(abstract)}
    save_file(weights.stored(ours, config.tensors()), target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(CONFIG))
    shutil.copy(resolve("sentence-transformers/all-MiniLM-L6-v2") / "tokenizer.json", target)
    return target


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def whole(directory, request):
    encoder = load_text_encoder(str(directory), dtype=jnp.dtype(request.param))
    return encoder, {name: np.asarray(leaf) for name, leaf in flatten(encoder.params)}


class Spy:
    """Counts how often each number of each tensor is read."""

    def __init__(self, monkeypatch):
        self.reads: dict[str, np.ndarray] = {}
        monkeypatch.setattr(weights, "safe_open", self.open)

    def open(self, *arguments):
        self.file = safe_open(*arguments)
        return self

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *arguments):
        self.file.__exit__(*arguments)

    def keys(self):
        return self.file.keys()

    def get_slice(self, name):
        slices = self.file.get_slice(name)
        count = self.reads.setdefault(name, np.zeros(slices.get_shape(), int))

        class Counted:
            get_dtype, get_shape = slices.get_dtype, slices.get_shape

            def __getitem__(self, index):
                count[index] += 1
                return slices[index]

        return Counted()


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_has_the_same_weights_and_features(directory, whole, sizes, monkeypatch):
    alone, expected = whole
    dtype = expected["words.embedding"].dtype
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    spy = Spy(monkeypatch)
    encoder = load_text_encoder(str(directory), dtype=dtype, mesh=mesh)
    found = dict(flatten(encoder.params))
    build = encoder.pretrained.architecture.build
    shardings = dict(flatten(param_shardings(mesh, logical_axes(build), encoder.params)))
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        assert leaf.dtype == dtype
        assert leaf.sharding == shardings[name]
        assert len(leaf.addressable_shards) == np.prod(sizes)
        np.testing.assert_array_equal(np.asarray(leaf), expected[name])
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), expected[name][shard.index])
    # Replicas share what is read.
    assert {int(n) for count in spy.reads.values() for n in np.unique(count)} == {1}
    if sizes[1:] != (1, 1):
        split = found["layers.1.up.kernel"]
        assert split.addressable_shards[0].data.size == split.size // (sizes[1] * sizes[2])
    if dtype != np.float32 and sizes != (2, 2, 2):
        return  # whether a sum is taken over devices does not hang on its precision
    ours, theirs = encoder(CAPTIONS), alone(CAPTIONS)
    tolerance = 1e-6 if dtype == np.float32 else 0.05  # sums in another order
    np.testing.assert_allclose(ours.hidden, theirs.hidden, atol=tolerance * np.abs(theirs.hidden).max())
    np.testing.assert_allclose(ours.pooled, theirs.pooled, atol=tolerance * np.abs(theirs.pooled).max())


FUSED = {
    **{f"{name}.kernel": Tensor("qkv.weight", transposed=True, part=(i, 3)) for i, name in enumerate("qkv")},
    **{f"{name}.bias": Tensor("qkv.bias", part=(i, 3)) for i, name in enumerate("qkv")},
    **{f"plain.{i}": Tensor("plain.weight", part=(i, 2)) for i in range(2)},
}
AXES = {name: (None, "heads") if "bias" not in name else ("heads",) for name in FUSED}
AXES |= {f"{name}.kernel": ("embed", "heads") for name in "qkv"}


@pytest.mark.parametrize("block", [1, 100, 2**26])
@pytest.mark.parametrize("sizes", [None, *MESHES], ids=str)
def test_parts_of_one_tensor_are_read_apart(tmp_path, sizes, block, monkeypatch):
    """In blocks of any size."""
    monkeypatch.setattr(weights, "BLOCK", block)
    rng = np.random.default_rng(0)
    kernels = {name: rng.normal(size=(16, 24)).astype(np.float32) for name in "qkv"}
    biases = {name: rng.normal(size=24).astype(np.float32) for name in "qkv"}
    plain = rng.normal(size=(4, 16)).astype(np.float32)
    stored = {
        "qkv.weight": np.concatenate(list(kernels.values()), axis=1).T.copy(),
        "qkv.bias": np.concatenate(list(biases.values())),
        "plain.weight": plain,
    }
    expected = {f"{name}.kernel": kernels[name] for name in "qkv"} | {f"{name}.bias": biases[name] for name in "qkv"}
    expected |= {f"plain.{i}": plain[:, 8 * i : 8 * i + 8] for i in range(2)}
    assert {name: (a == stored[name]).all() for name, a in weights.stored(expected, FUSED).items()} == dict.fromkeys(
        stored, True
    )
    save_file(stored, tmp_path / "model.safetensors")
    shapes = {name: value.shape for name, value in expected.items()}
    shardings = None
    if sizes is not None:
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        shardings = param_shardings(mesh, AXES, expected)
    spy = Spy(monkeypatch)
    found = dict(flatten(weights.load(tmp_path, FUSED, shapes, shardings=shardings)))
    for name, value in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), value)
    assert {int(n) for count in spy.reads.values() for n in np.unique(count)} == {1}
    for broken in ({"qkv.bias": stored["qkv.bias"][:-1]}, {"qkv.weight": stored["qkv.weight"][:48]}):
        save_file(stored | broken, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=f"tensor {next(iter(broken))} has shape"):
            weights.load(tmp_path, FUSED, shapes, shardings=shardings)


def test_what_is_loaded_lies_where_it_was_read(directory):
    """A CPU device takes over the buffer: at a multiple of 64 bytes, and jax keeps it alive."""
    value = weights._empty([3, 5], jnp.bfloat16)
    value[...] = 2
    taken = jax.device_put(value)
    assert taken.unsafe_buffer_pointer() == value.ctypes.data
    mesh = make_mesh(MeshConfig(8, 1, 1))
    encoder = load_pretrained(str(directory), mesh=mesh)
    leaf = encoder.params["words"]["embedding"]
    assert len({shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards}) == 1


def test_a_number_that_is_none_is_told_by_who_reads_it(tmp_path):
    stored = np.ones((8, 4), np.float32)
    stored[5, 1] = np.nan
    save_file({"b": stored}, tmp_path / "model.safetensors")
    place = NamedSharding(make_mesh(MeshConfig(1, 8, 1)), PartitionSpec("fsdp"))
    with pytest.raises(UserError, match="tensor b holds NaN"):
        weights.load(tmp_path, {"b": Tensor("b")}, {"b": (8, 4)}, shardings={"b": place})


CHILD = """
import json, sys
import jax, numpy as np
from jaxgen.parallel import runtime
from jaxgen.parallel.mesh import MeshConfig, make_mesh
runtime.start()
from jaxgen.nn.module import flatten
from jaxgen.text import weights
from jaxgen.text.encoder import load_pretrained
from tests.text.test_sharded import Spy
class Patch:
    setattr = staticmethod(setattr)
spy = Spy(Patch)
directory, fsdp, tensor = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = load_pretrained(directory, mesh=make_mesh(MeshConfig(1, fsdp, tensor)))
table = model.architecture.tensors()
for ours, leaf in flatten(model.params):
    owned = np.zeros(leaf.shape, int)
    for shard in leaf.addressable_shards:
        owned[shard.index] = 1
    tensor = table[ours]
    np.testing.assert_array_equal(spy.reads[tensor.name], owned.T if tensor.transposed else owned, err_msg=ours)
print(json.dumps({name: int(count.sum()) for name, count in spy.reads.items()}))
"""


def test_a_process_reads_what_it_owns_and_no_more(directory):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAXGEN_CPU_DEVICES": "2", "JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(directory), "2", "2"],
            env=environment | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i), "XLA_FLAGS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    told = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in told)
    up = "encoder.layer.0.intermediate.dense.weight"  # [24, 16]: split by both axes
    assert first[up] == second[up] == 24 * 16 // 2
    norm = "embeddings.LayerNorm.weight"  # replicated
    assert first[norm] == second[norm] == 16
