from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxgen.errors import UserError
from jaxgen.nn.layers import matmul
from jaxgen.parallel.mesh import MeshConfig, check_batch, make_mesh, on_mesh, param_shardings, platform


def test_one_axis_takes_what_is_left():
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(MeshConfig(2, -1, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [(MeshConfig(16), "asks for 16 devices and there are 8"), (MeshConfig(-1, 3), "leaves 2 of 8 devices idle")],
)
def test_meshes_that_do_not_fit_are_told(config, message):
    with pytest.raises(UserError, match=message):
        make_mesh(config)


def test_rules_split_what_divides_and_use_an_axis_once():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    axes = {"up": ("embed", "mlp"), "odd": ("embed", "mlp"), "same": ("embed", "embed"), "norm": (None,)}
    shapes = {"up": (4, 8), "odd": (3, 8), "same": (4, 4), "norm": (4,)}
    found = param_shardings(mesh, axes, {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()})
    assert {name: sharding.spec for name, sharding in found.items()} == {
        "up": PartitionSpec("fsdp", "tensor"),
        "odd": PartitionSpec(None, "tensor"),
        "same": PartitionSpec("fsdp", None),
        "norm": PartitionSpec(None),
    }


def test_a_batch_that_does_not_split_names_one_that_does():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    check_batch(8, mesh, accumulate=2)
    with pytest.raises(UserError, match="try 12"):
        check_batch(13, mesh)
    with pytest.raises(UserError, match=r"accumulate=3.*try 12"):
        check_batch(10, mesh, accumulate=3)


def test_layers_are_written_for_the_platform_of_their_mesh():
    """Which need not be this machine's: a plan for chips that are not at hand is to see what they will run."""
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    elsewhere: Any = SimpleNamespace(devices=np.array([SimpleNamespace(platform="tpu")]), abstract_mesh=mesh.abstract_mesh)
    x, kernel = jnp.ones((2, 3, 4)), jnp.ones((4, 5))

    def axes_of_product(mesh):
        (product,) = [e for e in jax.make_jaxpr(on_mesh(mesh, matmul))(x, kernel).eqns if e.primitive.name == "dot_general"]
        return product.invars[0].aval.ndim

    assert axes_of_product(mesh) == 2
    assert axes_of_product(elsewhere) == 3
    assert platform() == jax.default_backend()  # as before
