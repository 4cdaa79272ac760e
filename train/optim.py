"""Optimizers as optax chains: AdamW, or Muon inside the layers and Adam elsewhere; rules go by path.

Parameters are nested dicts; those of the layers are stacked, [L, ...] below a key "layers". Rank alone would
take a stacked bias for a matrix and a stacked matrix for none, so every rule looks at the path as well.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from train.sharding import path_name

SCHEDULES = ("constant", "cosine", "wsd")
OPTIMIZERS = ("adamw", "muon")
MUON_RMS = 0.2  # update RMS that lets Muon share Adam's learning rate (arXiv 2502.16982)


def schedule(
    kind: str, lr: float, *, steps: int, warmup: int = 0, flat: float = 0.3, end: float = 0.0
) -> optax.Schedule:
    """Learning rate at a step, counted from 0.

    Every kind rises linearly over `warmup` steps, (step + 1) / warmup, so that the first step moves too.
    "constant" stays; "cosine" falls from the warm-up's end to lr * end at `steps`; "wsd" (warm-up, stable,
    decay) stays up to the share `flat` of all steps and then falls linearly to lr * end.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {kind!r}")
    if steps < 1 or not 0 <= warmup <= steps:
        raise ValueError(f"warmup: expected 0 <= warmup <= steps={steps}, got {warmup}")
    if not 0 <= flat <= 1:
        raise ValueError(f"flat: expected a share in [0, 1], got {flat}")
    start = max(warmup, flat * steps) if kind == "wsd" else warmup
    length = max(steps - start, 1)

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(1.0, (step + 1) / max(warmup, 1))
        done = jnp.clip((step - start) / length, 0.0, 1.0)
        if kind == "cosine":
            fall = end + (1 - end) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        elif kind == "wsd":
            fall = 1 - (1 - end) * done
        else:
            fall = 1.0
        return lr * rise * fall

    return rate


def is_matrix(name: str, ndim: int) -> bool:
    """Whether the parameter maps features to features: a kernel, not a norm, bias, embedding or position."""
    return name.rsplit("/", 1)[-1] == "kernel" and ndim - is_stacked(name) >= 2


def is_stacked(name: str) -> bool:
    return "layers" in name.split("/")


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: matrices."""
    return jax.tree_util.tree_map_with_path(lambda path, x: is_matrix(path_name(path), jnp.ndim(x)), params)


def muon_mask(params: Any) -> Any:
    """True where Muon applies: the stacked matrices [L, in, out] of the layers."""

    def one(path, leaf):
        name, ndim = path_name(path), jnp.ndim(leaf)
        return is_stacked(name) and is_matrix(name, ndim) and ndim == 3

    return jax.tree_util.tree_map_with_path(one, params)


def rate_factors(params: Any, groups: Mapping[str, float]) -> Any:
    """The learning-rate factor of every leaf: that of the longest prefix of its path in `groups`, else 1."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for prefix, factor in groups.items():
        if factor < 0:
            raise ValueError(f"groups[{prefix!r}]: expected a factor of 0 or more, got {factor}")
        if not any(_under(name, prefix) for name in names):
            tops = sorted({name.split("/")[0] for name in names})
            raise ValueError(f"groups: expected prefixes of parameter paths ({', '.join(tops)}), got {prefix!r}")

    def one(path, _):
        name = path_name(path)
        fitting = [prefix for prefix in groups if _under(name, prefix)]
        return float(groups[max(fitting, key=len)]) if fitting else 1.0

    return jax.tree_util.tree_map_with_path(one, params)


def _under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix.rstrip("/") + "/")


def _muon(beta: float, steps: int) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised layer by layer, scaled to an RMS that Adam's rate suits."""
    dims = MuonDimensionNumbers(reduction_axis=1, output_axis=2)

    def numbers(updates):
        is_masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
        return jax.tree.map(lambda x: x if is_masked(x) else dims, updates, is_leaf=is_masked)

    def rescale(updates, params=None):
        return jax.tree.map(lambda u: u * (MUON_RMS * max(u.shape[1:]) ** 0.5), updates)

    return optax.chain(
        scale_by_muon(beta=beta, ns_steps=steps, nesterov=True, weight_dimension_numbers=numbers),
        optax.stateless(rescale),
    )


def make_optimizer(
    kind: str = "adamw",
    lr: float | optax.Schedule = 1e-3,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    groups: Mapping[str, float] | None = None,
    muon_beta: float = 0.95,
    muon_steps: int = 5,
) -> optax.GradientTransformation:
    """ "adamw" (arXiv 1711.05101), or "muon" (Jordan 2024) on the matrices of the layers and Adam elsewhere.

    clip: largest global norm of the gradient. weight_decay acts on matrices only, times the learning rate.
    groups: path prefix -> factor on the learning rate (`{"vision": 0.3}`); 0 freezes.
    """
    if kind not in OPTIMIZERS:
        raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {kind!r}")
    if clip is not None and clip <= 0:
        raise ValueError(f"clip: expected a positive norm, or None, got {clip}")
    groups = dict(groups or {})

    def labels(params):
        muon = muon_mask(params) if kind == "muon" else jax.tree.map(lambda _: False, params)
        factors = rate_factors(params, groups)
        return jax.tree.map(lambda m, f: "frozen" if f == 0 else "muon" if m else "adam", muon, factors)

    rules = {
        "muon": _muon(muon_beta, muon_steps),
        "adam": optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        "frozen": optax.set_to_zero(),
    }
    parts = [optax.partition(rules, labels)]
    if clip is not None:
        parts.insert(0, optax.clip_by_global_norm(clip))
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay, decay_mask))
    if groups:

        def scale(updates, params=None):
            return jax.tree.map(lambda u, f: u * f, updates, rate_factors(updates, groups))

        parts.append(optax.stateless(scale))
    return optax.chain(*parts, optax.scale_by_learning_rate(lr))
