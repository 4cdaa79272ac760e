"""Low-rank adapters (LoRA, arXiv:2106.09685): what a frozen linear map W lacks is learned as a product of two thin ones,

    y = x W + (alpha / rank) (x A) B,     A [in, rank] random, B [rank, out] zero at first.

Adapters are a tree beside the parameters; ``attach`` puts them where ``layers.dense`` reads them, ``merge`` folds them into
the kernels.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp

from jaxattn import registry
from jaxattn.core.types import Array, contract, expect
from jaxattn.nn.partition import path_name

MAPS = ("q", "k", "v", "o", "gate", "up", "down")
PLACE = re.compile(rf"(?:^|/)layers/(?:attn|mlp)/({'|'.join(MAPS)})/kernel$")


@contract
class Lora:
    """rank; alpha: None for the rank (a factor of 1); targets: names among q, k, v, o, gate, up, down, joined by "+", or "all";
    dropout: share of the inputs of A that a training step zeroes."""

    rank: int = 8
    alpha: float | None = None
    targets: str = "all"
    dropout: float = 0.0

    def check(self):
        expect("rank", self.rank, "at least 1", isinstance(self.rank, int) and self.rank >= 1)
        unknown = sorted(set(self.names) - set(MAPS))
        expect("targets", self.targets, f"names among {', '.join(MAPS)} joined by '+', or 'all'", not unknown)
        expect("dropout", self.dropout, "at least 0 and below 1", 0 <= self.dropout < 1)

    @property
    def names(self) -> tuple[str, ...]:
        return MAPS if self.targets == "all" else tuple(self.targets.split("+"))

    @property
    def scale(self) -> float:
        return (self.rank if self.alpha is None else self.alpha) / self.rank


def parse(text: str) -> Lora:
    """Lora from "rank=8,alpha=16,targets=q+v"."""
    return registry.build("lora", Lora, text)


def places(params: dict, lora: Lora) -> list[str]:
    """Paths of the linear maps of layers that adapters go beside, without "/kernel"."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    found = [n.removesuffix("/kernel") for n in names if (m := PLACE.search(n)) and m.group(1) in lora.names]
    lost = sorted(set(lora.names) - {n.rsplit("/", 1)[1] for n in found})
    expect("targets", lora.targets, f"maps of the model, which has no {', '.join(lost)}", not lost or lora.targets == "all")
    return found


def init(params: dict, lora: Lora, key) -> dict:
    """Fresh adapters, float32: {path: {"a": [L, in, rank], "b": [L, rank, out]}} as a nested dict; A as U(-1, 1) / sqrt(in)."""
    found: dict = {}
    for i, place in enumerate(places(params, lora)):
        kernel = _at(params, place)["kernel"]
        layers, wide, out = kernel.shape
        a = jax.random.uniform(jax.random.fold_in(key, i), (layers, wide, lora.rank), jnp.float32, -1, 1) * wide**-0.5
        put(found, place, {"a": a, "b": jnp.zeros((layers, lora.rank, out), jnp.float32)})
    return found


def attach(params: dict, adapters: dict, lora: Lora, key: Array | None = None) -> dict:
    """The parameters with adapters beside their kernels. key: for dropout in a training step, None without."""
    found = _copied(params)
    for i, (place, pair) in enumerate(pairs(adapters)):
        there = {"a": pair["a"] * lora.scale, "b": pair["b"]}
        if lora.dropout and key is not None:
            keys = jax.random.split(jax.random.fold_in(key, i), len(pair["a"]))
            there |= {"key": jax.random.key_data(keys), "keep": jnp.full(len(pair["a"]), 1 - lora.dropout)}
        _at(found, place)["lora"] = there
    return found


def merge(params: dict, adapters: dict, lora: Lora) -> dict:
    """The parameters with W + scale A B in place of W, each in the dtype it had."""

    @jax.jit
    def fold(kernel, a, b):
        return (kernel.astype(jnp.float32) + lora.scale * jnp.matmul(a, b, precision="highest")).astype(kernel.dtype)

    found = _copied(params)
    for place, pair in pairs(adapters):
        there = _at(found, place)
        there["kernel"] = fold(there["kernel"], pair["a"].astype(jnp.float32), pair["b"].astype(jnp.float32))
    return found


def _copied(tree):
    return {k: _copied(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _at(tree: dict, place: str) -> dict:
    for name in place.split("/"):
        tree = tree[name]
    return tree


def put(tree: dict, place: str, value) -> None:
    """Write what goes beside (or under) a path of a nested dict."""
    *folders, last = place.split("/")
    for name in folders:
        tree = tree.setdefault(name, {})
    tree[last] = value


def pairs(adapters: dict, at: str = "") -> list[tuple[str, dict]]:
    """(place, {"a", "b"}) of a tree of adapters."""
    if "a" in adapters and not isinstance(adapters["a"], dict):
        return [(at, adapters)]
    return [pair for name in sorted(adapters) for pair in pairs(adapters[name], f"{at}/{name}".strip("/"))]


__all__ = ["MAPS", "PLACE", "Lora", "attach", "init", "merge", "pairs", "parse", "places", "put"]
