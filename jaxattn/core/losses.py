"""Distances between what two models say: shared by everything that is trained against a teacher."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxattn.core.types import Array, expect


def weighted_mean(x: Array, weight: Array | None = None) -> Array:
    """Mean of x over the entries of ``weight`` (the same shape, at least 0); 0 where none counts."""
    if weight is None:
        return x.mean()
    weight = weight.astype(x.dtype)
    # Entries that do not count may hold anything.
    return jnp.where(weight > 0, x, 0.0).ravel() @ weight.ravel() / jnp.maximum(weight.sum(), 1e-9)


def divergence(student: Array, teacher: Array, weight: Array | None = None, *, temperature: float = 1.0) -> Array:
    """temperature^2 KL(softmax(teacher / temperature) || softmax(student / temperature)), mean over the rows.

    student, teacher: logits [..., V], nothing is trained through the teacher's.  weight: [...], of the rows.
    """
    expect("student", f"shape {student.shape}", f"the teacher's, {teacher.shape}", student.shape == teacher.shape)
    acc = jnp.promote_types(student.dtype, jnp.float32)
    q, p = (jax.nn.log_softmax(x.astype(acc) / temperature, -1) for x in (student, jax.lax.stop_gradient(teacher)))
    return temperature**2 * weighted_mean(jnp.sum(jnp.exp(p) * (p - q), -1), weight)


__all__ = ["divergence", "weighted_mean"]
