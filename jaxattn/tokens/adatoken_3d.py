"""AdaToken-3D: spatial tokens leave where a layer has read them ("AdaToken-3D: Dynamic Spatial Gating for Efficient 3D
Large Multimodal-Models Reasoning").

A 3-D model reads [system | spatial tokens | 2-D image tokens | text]. With A a layer's attention, heads averaged:

    flow(a <- b) = sum_{i in a, j in b} A_ij / |a|          between groups of rows
    c_j = mean_{i in text} A_ij                              what spatial token j contributes

A calibration run sorts each sample's contributions and takes, per layer, the smallest share of tokens that makes
1 - eps of their mass; shares never rise with depth. At run time each sample keeps that share of its own largest
contributors; tokens that left do not return, and 2-D image tokens are not touched. The paper's code is not public: the
metric and the rule follow its text, their exact form is ours.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxattn.core.reduce import check_budget
from jaxattn.core.statistics import log_mass, masses
from jaxattn.core.types import Array, Call, contract, expect
from jaxattn.registry import register
from jaxattn.tokens.staged import check_rates, rank_cuts


def information_flow(call: Call, label: str, groups: int, lse: Array | None = None) -> Array:
    """[B, groups, groups]: mean attention of the valid rows of one group to all keys of another, heads averaged.

    Args:
      call: one layer's attention, whose Metas carry ``label`` with values in [0, groups).
      lse: [B, N, H] of its rows, or None to compute it.
    A group without rows gives 0. Each row of groups sums to 1 where every key is in some group.
    """
    mass = masses(call, label, groups, log_mass(call) if lse is None else lse).mean(2)  # [B, N, groups]
    meta = call.q_meta
    expect("call.q_meta.labels", sorted(meta.labels) or "none", f"the label {label!r}", label in meta.labels)
    shape = mass.shape[:2]
    mine = jnp.broadcast_to(meta.labels[label], shape)[..., None] == jnp.arange(groups)
    mine = (mine & jnp.broadcast_to(meta.valid, shape)[..., None]).astype(mass.dtype)
    return jnp.einsum("bna,bng->bag", mine, mass) / jnp.maximum(mine.sum(1), 1)[..., None]


def contribution_curve(contributions: np.ndarray) -> np.ndarray:
    """[L, N] mean share of the mass made by the 1, 2, ... N largest contributors; contributions [S, L, N], at least 0."""
    c = np.asarray(contributions, np.float64)
    expect("contributions", f"shape {c.shape}", "[samples, layers, tokens]", c.ndim == 3)
    expect("contributions", "negative entries", "at least 0", (c >= 0).all())
    mean = -np.sort(-c, axis=-1).mean(0)
    total = mean.sum(-1, keepdims=True)
    return np.cumsum(mean, -1) / np.where(total > 0, total, 1)


def adatoken_rates(contributions: np.ndarray, eps: float = 0.05) -> tuple[float, ...]:
    """Shares of tokens that the layers read: the smallest that make 1 - ``eps`` of the mass, 1 in the first layer (which
    has to rank) and never rising. contributions: [S, L, N] of S samples, 0 where there is no token."""
    expect("eps", eps, "in [0, 1)", 0 <= eps < 1)
    curve = contribution_curve(contributions)
    # Rounding must not ask for one token more than the mass needs.
    share = ((curve < 1 - eps - 1e-12).sum(-1) + 1) / curve.shape[-1]
    rates = np.minimum.accumulate(np.concatenate([[1.0], share[:-1]]))  # layer i is read after layer i - 1 has ranked
    return tuple(float(r) for r in rates)


@contract
class _AdaToken:
    rates: tuple
    name: str | None = None
    others: int = 0
    least: float = 0.0
    mode: str = "keep"
    positions: str = "original"

    def check(self):
        check_budget(1, self.mode, self.positions)
        check_rates(self.rates)
        expect("others", self.others, "0 or more rows", self.others >= 0)
        expect("least", self.least, "a share of the tokens in [0, 1)", 0 <= self.least < 1)

    def schedule(self, layers):
        expect("rates", len(self.rates), f"one share per layer, {layers}", len(self.rates) == layers)
        return rank_cuts(self.rates, "text", self.mode, self.positions, least=self.least, name=self.name, others=self.others)


@register("tokens")
def adatoken_3d(rates, name: str | None = None, others: int = 0, least: float = 0.0, mode: str = "keep",
                positions: str = "original"):
    """Keep in each layer the share of spatial tokens that text reads (site "llm").

    Args:
      rates: one share per layer, 1 first, never rising: ``adatoken_rates`` of a calibration run.
      name: label that is 1 at spatial tokens; None: all rows of the image group are.
      others: rows of the image group without it (2-D image tokens); they always stay.
      least: layers that would drop a smaller share wait for the next one.
      mode: "keep" (gather) or "mask".  positions: rotary positions "original" or "fresh".
    """  # fmt: skip
    return _AdaToken(check_rates(rates), name, others, least, mode, positions)
