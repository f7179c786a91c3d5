"""What is known of accelerators, as their makers publish it; a CPU is measured instead (plan.py)."""

from typing import NamedTuple


class Device(NamedTuple):
    """One chip. FLOP/s dense in bfloat16; bytes and bytes a second."""

    flops: float
    memory: float
    bandwidth: float  # to its memory
    link: float  # of one link to a neighbour, one way
    links: int  # that a collective keeps busy where its chips close a ring
    ring: int  # chips from which on a dimension of the torus is closed; smaller ones are lines, of half the speed
    network: float  # between slices or hosts, a chip's share
    tile: int  # a side of the matrix unit, to which sizes are rounded up; 1 where that does not matter


# By the start of jax's device_kind; the first that fits. TPU figures: cloud.google.com/tpu/docs (v5p's share of the network:
# jax-ml.github.io/scaling-book); GPU figures: NVIDIA's data sheets of the SXM modules, network 400 Gbit/s a GPU.
DEVICES = {
    "NVIDIA H200": Device(989e12, 141e9, 4.8e12, 450e9, 1, 1, 50e9, 1),
    "NVIDIA H100": Device(989e12, 80e9, 3.35e12, 450e9, 1, 1, 50e9, 1),
    "NVIDIA A100": Device(312e12, 80e9, 2.04e12, 300e9, 1, 1, 25e9, 1),
    "TPU v4": Device(275e12, 32 * 2**30, 1.228e12, 50e9, 2, 4, 6.25e9, 128),
    "TPU v5 lite": Device(197e12, 16 * 2**30, 819e9, 50e9, 2, 16, 3.125e9, 128),
    "TPU v5e": Device(197e12, 16 * 2**30, 819e9, 50e9, 2, 16, 3.125e9, 128),
    "TPU v5": Device(459e12, 95 * 2**30, 2.765e12, 100e9, 2, 4, 6.25e9, 128),  # v5p
    "TPU v6 lite": Device(918e12, 32 * 2**30, 1.64e12, 100e9, 2, 16, 12.5e9, 256),
    "TPU v6e": Device(918e12, 32 * 2**30, 1.64e12, 100e9, 2, 16, 12.5e9, 256),
}

# Slices that libtpu describes, for the message about one that it does not.
TOPOLOGIES = ("v4:2x2x1 … 4x4x4", "v5e:2x2 … 16x16", "v5p:2x2x1 … 4x4x4", "v6e:2x2 … 16x16")


def known(kind: str) -> Device | None:
    """The facts of a device_kind, None where there are none."""
    return next((device for name, device in DEVICES.items() if kind.startswith(name)), None)
