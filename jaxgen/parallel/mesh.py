"""The mesh, its axes, and the rules that lay arrays on it: the one file to read before changing a sharding."""

import functools
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgen.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Logical axis of a parameter -> mesh axis. "fsdp" splits what is wide whatever the layer does (ZeRO-3, arXiv 1910.02054);
# "tensor" splits what computes independently: heads, hidden units, output channels (Megatron, arXiv 1909.08053).
RULES: dict[str | None, str | None] = {
    "embed": "fsdp",
    # Not split: XLA computes wrong gradients of a convolution whose kernel is split by input and by output channels.
    "in_channels": None,
    "mlp": "tensor",
    "heads": "tensor",
    "channels": "tensor",
    "vocab": "tensor",
    "kv": None,  # a head stays whole
    None: None,
}


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one may be -1, which takes those that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def validate(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise UserError(f"mesh.data, mesh.fsdp, mesh.tensor = {sizes}: positive numbers, of which one may be -1")


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A mesh with axes ("data", "fsdp", "tensor"); raises UserError where the devices do not make it up.

    Of several TPU slices each is whole along "fsdp" and "tensor": only the gradients' sum over "data" leaves it."""
    devices = devices if devices is not None else jax.devices()
    sizes = [config.data, config.fsdp, config.tensor]
    fixed = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(len(devices) // fixed, 1)
    named = " × ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    needed = int(np.prod(sizes))
    if needed > len(devices):
        raise UserError(f"the mesh {named} asks for {needed} devices and there are {len(devices)}: lower mesh.*")
    if needed < len(devices) and (-1 in (config.data, config.fsdp, config.tensor) or jax.process_count() > 1):
        raise UserError(f"the mesh {named} leaves {len(devices) - needed} of {len(devices)} devices idle: set mesh.data=-1")
    return Mesh(lay_out(sizes, devices[:needed]), AXES, axis_types=(AxisType.Auto,) * 3)


def lay_out(sizes: list[int], devices: list[Any]) -> np.ndarray:
    """The devices in the order of a mesh of these sizes, neighbours close by; several slices along its first axis."""
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices > 1 and sizes[0] % slices == 0:
        within, between = [sizes[0] // slices, *sizes[1:]], [slices, *[1] * len(sizes[1:])]
        return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    if slices > 1 and devices[0].platform == "tpu":
        raise UserError(f"mesh.data={sizes[0]} is no multiple of the {slices} slices, between which only examples are split")
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def param_shardings(mesh: Mesh, axes: Any, params: Any) -> Any:
    """A NamedSharding for each parameter from its logical axes; a dimension its mesh axis does not divide (or that the mesh
    lacks) stays whole."""

    def place(names: tuple[str | None, ...], p: Any) -> NamedSharding:
        used: list[str | None] = []
        for name, size in zip(names, p.shape, strict=True):
            axis = RULES[name]
            fits = axis in mesh.shape and axis not in used and size % mesh.shape[axis] == 0
            used.append(axis if fits else None)
        return NamedSharding(mesh, PartitionSpec(*used))

    return jax.tree.map(place, axes, params, is_leaf=lambda node: isinstance(node, tuple))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples split over every device that does not share the work on one (the tensor axis does)."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


_platform: ContextVar[str | None] = ContextVar("platform", default=None)


def on_mesh(mesh: Mesh, function: Any) -> Any:
    """`function`, to be jitted, whose layers are written for this mesh: its `platform`, and outputs laid out on it
    (`constrain`)."""

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        token = _platform.set(mesh.devices.flat[0].platform)
        try:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return function(*args)
        finally:
            _platform.reset(token)

    return traced


def platform() -> str:
    """What is being traced for: the platform of the mesh at hand, which need not be this machine's (parallel/plan.py)."""
    return _platform.get() or jax.default_backend()


def constrain(x: jax.Array, channels: str | None) -> jax.Array:
    """An activation [B, ..., C] with its examples split as a batch's are and its channels, of that logical axis, only by
    "tensor"; x itself without a mesh or where the examples do not divide.

    Not for speed alone: left to choose a layout for a sum of two products whose weights lie on all three axes, XLA's
    partitioner takes some examples for others."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.axis_names != AXES or mesh.manual_axes:
        return x
    if x.ndim < 2 or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    split = RULES[channels] == "tensor" and x.shape[-1] % mesh.shape["tensor"] == 0
    spec = PartitionSpec(("data", "fsdp"), *[None] * (x.ndim - 2), "tensor" if split else None)
    return jax.lax.with_sharding_constraint(x, spec)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises UserError where the batch does not split evenly."""
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (shares * accumulate):
        near = max(round(batch_size / (shares * accumulate)), 1) * shares * accumulate
        raise UserError(
            f"train.batch_size={batch_size} does not divide among mesh.data × mesh.fsdp = {shares} devices"
            f"{f' and train.accumulate={accumulate}' if accumulate > 1 else ''}: try {near}"
        )
