"""Muon: momentum whose matrices are made orthogonal (Jordan et al., 2024; arXiv 2502.16982).

optax's goes matrix by matrix on every device, which costs as much as a small network itself. Its iteration only ever
multiplies M by polynomials of M Mᵀ, so here it runs on those small squares, the squares of one size in one batched
product, and the devices share the batch."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration
STEPS = 5
RMS = 0.2  # of an update's entries, as AdamW's, so that one learning rate serves both (arXiv 2502.16982, eq. 4)
HEADS_LAST = ("q", "k", "v", "context_k", "context_v")  # kernels [D, H, d]; all others end with their output


def orthogonalized(mesh: Mesh | None = None) -> optax.GradientTransformation:
    """Replaces every kernel's update by the nearest matrix with orthogonal rows or columns, at an RMS of 0.2."""

    def update(updates, state, params=None):
        leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
        matrices = [leaf.reshape(_rows(path, leaf), -1) for path, leaf in leaves]
        with jax.default_matmul_precision("float32"):
            made = newton_schulz(matrices, mesh)
        scaled = [RMS * math.sqrt(max(m.shape)) * m.reshape(leaf.shape) for m, (_, leaf) in zip(made, leaves, strict=True)]
        return jax.tree.unflatten(tree, scaled), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def newton_schulz(matrices: list[jax.Array], mesh: Mesh | None = None) -> list[jax.Array]:
    """Matrices of any shapes -> the same with singular values near 1, as five Newton-Schulz steps leave them."""
    squares = [m @ m.T if m.shape[0] <= m.shape[1] else m.T @ m for m in matrices]
    factors: dict[int, jax.Array] = {}
    for size in sorted({len(square) for square in squares}):
        alike = [i for i, square in enumerate(squares) if len(square) == size]
        stack = _shared(_polynomial, jnp.stack([squares[i] for i in alike]), mesh)
        factors |= dict(zip(alike, stack, strict=False))
    return [factors[i] @ m if m.shape[0] <= m.shape[1] else m @ factors[i] for i, m in enumerate(matrices)]


def _polynomial(a: jax.Array) -> jax.Array:
    """p(A) [N, m, m] for squares A = M Mᵀ, so that p(A) M is what the iteration makes of M / |M|."""
    b1, b3, b5 = COEFFICIENTS
    identity = jnp.eye(a.shape[-1], dtype=a.dtype)
    norm = jnp.sqrt(jnp.trace(a, axis1=-2, axis2=-1))[:, None, None] + 1e-8
    a, p = a / jnp.square(norm), identity / norm
    for k in range(STEPS):
        q = b1 * identity + b3 * a + b5 * (a @ a)
        p = q @ p if k else q / norm
        if k + 1 < STEPS:
            a = q @ a @ q
    return p


def _shared(function: Callable[[jax.Array], jax.Array], stack: jax.Array, mesh: Mesh | None) -> jax.Array:
    """function(stack) with the stack split over all devices, filled up with zeros where they do not divide it."""
    if mesh is None or mesh.size == 1:
        return function(stack)
    place = lambda x, *axes: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))  # noqa: E731
    filled = jnp.pad(place(stack), ((0, -len(stack) % mesh.size), (0, 0), (0, 0)))
    return place(function(place(filled, mesh.axis_names)))


def _rows(path: tuple, leaf: jax.Array) -> int:
    return leaf.shape[0] if path[-1].key in HEADS_LAST else math.prod(leaf.shape[:-1])
