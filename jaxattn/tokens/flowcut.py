"""FlowCut: the vision tower sheds patches as it goes, by what flows through [CLS] ("FlowCut: Rethinking Redundancy via
Information Flow for Efficient Vision-Language Models").

In each layer, over the N patches that are left, with A the layer's probabilities and v its values:

    a_j = mean_h A[h, CLS, j],   b_j = mean_h softmax(v_CLS . v)_j,   score_j = (a_j / sum a + b_j / sum b) |mean_h v_j|_1
    c <- c / 2 + score / 2        (c = score in the first layer)

After every second layer, with r more layers to prune in (r even, down to 0 in the last but two), H the entropy of
a / sum a and K the budget,

    round((N - K) / sqrt(r) (1 - (H / log N)^2))

patches of least c leave; r = 0 leaves exactly K. How many leave when depends on the image: rows are masked until the last
cut gathers the K, or ``lengths`` fixes the counts (measured on a set of images) and every cut gathers. The published
code takes the largest count of a batch; here each image has its own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxattn.core.reduce import (
    check_budget,
    choose,
    count_of,
    dispose,
    evidence_rows,
    follow_rows,
    rows_left,
    valid_rows,
)
from jaxattn.core.types import Array, Need, State, contract, expect, operand
from jaxattn.registry import register


def flow_score(relation: Array, semantic: Array, values: Array, *, valid: Array | None = None) -> Array:
    """[B, N] scores of one layer.

    Args:
      relation: [B, N], mean over heads of the [CLS] row's probabilities.  semantic: [B, N], mean over heads of the softmax
        of value products.  values: [B, N, H, D].  valid: bool [B, N]; others get 0.
    """
    valid = jnp.ones(relation.shape, bool) if valid is None else valid
    strength = jnp.abs(values.astype(jnp.promote_types(values.dtype, jnp.float32)).mean(2)).sum(-1)
    return jnp.where(valid, (_share(relation, valid) + _share(semantic, valid)) * strength, 0)


def _share(x: Array, valid: Array) -> Array:
    x = jnp.where(valid, x, 0)
    total = x.sum(-1, keepdims=True)
    return x / jnp.where(total > 0, total, 1)


def flowcut_scores(attention_cls: Array, values: Array) -> Array:
    """[B, N]: one layer's scores from its [CLS] row [B, H, 1 + N] and its values [B, 1 + N, H, D], [CLS] first."""
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    similar = jnp.einsum("bhd,bnhd->bhn", values[:, 0], values, precision="highest")
    semantic = jax.nn.softmax(similar, -1)[..., 1:].mean(1)
    return flow_score(attention_cls[..., 1:].mean(1), semantic, values[:, 1:])


def flowcut_left(relation: Array, target, remaining: int, *, valid: Array | None = None) -> Array:
    """int32 [B]: patches that stay after a layer.

    Args:
      relation: [B, N], heads' mean [CLS] row over the patches.  target: K, int or int32 scalar.
      remaining: layers left to prune in, even; 0 leaves K.  valid: bool [B, N], the patches still there.
    """
    valid = jnp.ones(relation.shape, bool) if valid is None else valid
    n, target = valid.sum(-1), jnp.asarray(target, jnp.int32)
    if remaining == 0:
        return jnp.minimum(n, target)
    p = _share(relation, valid)
    entropy = jax.scipy.special.entr(p).sum(-1) / jnp.log(jnp.maximum(n, 2).astype(p.dtype))
    gone = jnp.round((n - target) / jnp.sqrt(jnp.asarray(remaining, p.dtype)) * (1 - entropy**2)).astype(jnp.int32)
    return jnp.minimum(n, jnp.maximum(n - gone, target))


@contract
class _FlowCutStep:
    """The cut after layer ``layer``; the layers from ``first`` on have not been scored yet."""

    keep: int = operand("budget")
    first: int = 0
    layer: int = 0
    remaining: int = 0
    length: int | None = None
    mode: str = "keep"
    positions: str = "original"

    carries = "flowcut"

    def needs(self):
        found = []
        for i in range(self.first, self.layer + 1):
            at = f"vision.{i}"
            found += [Need(f"relation.{i}", what="received", at=at, rows="cls"),
                      Need(f"semantic.{i}", what="raw_value_received", at=at, rows="cls"),
                      Need(f"values.{i}", what="values", at=at)]  # fmt: skip
        return tuple(found)

    def gathers(self) -> bool:
        return self.mode == "keep" and (self.remaining == 0 or self.length is not None)

    def rows(self, n):
        if not self.gathers():
            return n
        return min(n, self.length) if self.length is not None and self.remaining else rows_left(self.keep, n, "keep")

    def apply(self, params, state, tokens, evidence, ctx):
        n, valid = tokens.x.shape[1], valid_rows(tokens)
        total = None if isinstance(state.shared, tuple) else state.shared
        for i in range(self.first, self.layer + 1):
            expect("evidence", sorted(evidence) or "none", f"the entry 'values.{i}'", f"values.{i}" in evidence)
            relation = evidence_rows(evidence, f"relation.{i}", tokens)
            score = flow_score(relation, evidence_rows(evidence, f"semantic.{i}", tokens), evidence[f"values.{i}"], valid=valid)
            total = score if total is None else 0.5 * total + 0.5 * score
        target = jnp.asarray(params["keep"], jnp.int32) if self.remaining else count_of(params, n)
        if self.length is not None and self.remaining:
            left = jnp.maximum(jnp.minimum(self.length, valid.sum(-1)), target)
        else:
            left = flowcut_left(relation, target, self.remaining, valid=valid)
        keep = choose(total, left, valid)
        mode, rows = ("keep" if self.gathers() else "mask"), self.rows(n)
        out = dispose(tokens, keep, rows, mode, self.positions)
        return out, State(shared=follow_rows(total, keep, rows, mode)), {"scores": total, "left": left}


@contract
class _FlowCut:
    keep: int
    lengths: tuple | None = None
    mode: str = "keep"
    positions: str = "original"

    def check(self):
        check_budget(self.keep, self.mode, self.positions)
        falls = self.lengths is None or all(a >= b >= self.keep for a, b in zip(self.lengths, self.lengths[1:], strict=False))
        expect("lengths", self.lengths, f"counts that do not rise, at least keep = {self.keep}", falls)

    def steps(self, layers: int) -> tuple[int, ...]:
        """0-based layers after which patches leave: every second one up to the last but two."""
        expect("layers", layers, "a tower of at least 3 layers", layers >= 3)
        return tuple(range((layers - 3) % 2, layers - 2, 2))

    def sites(self, layers):
        return tuple(i + 1 for i in self.steps(layers))

    def schedule(self, layers):
        steps = self.steps(layers)
        lengths = (None,) * (len(steps) - 1) if self.lengths is None else self.lengths
        expect("lengths", lengths, f"one count per cut before the last, {len(steps) - 1}", len(lengths) == len(steps) - 1)
        first = (0, *(i + 1 for i in steps))
        return tuple((i + 1, _FlowCutStep(self.keep, a, i, layers - 3 - i, m, self.mode, self.positions))
                     for a, i, m in zip(first, steps, (*lengths, None), strict=False))  # fmt: skip


@register("tokens")
def flowcut(keep: int, lengths: tuple[int, ...] | None = None, mode: str = "keep", positions: str = "original"):
    """Prune patches inside the vision tower down to ``keep`` before its last two layers. For the site "vision" of a
    vision-language model or a vision transformer.

    Args:
      keep: image tokens per image, exactly.
      lengths: patches left by each cut but the last (its count is ``keep``), the same for every image: all cuts gather
        and later layers are shorter. None: by entropy, per image, masked until the last cut.
      mode: "keep" or "mask" (the last cut masks, too).  positions: rotary positions "original" or "fresh".
    """
    return _FlowCut(keep, lengths, mode, positions)


@contract
class _FlowCutText:
    keep: int = operand("budget")
    mode: str = "keep"
    positions: str = "original"

    def check(self):
        check_budget(self.keep, self.mode, self.positions)

    def needs(self):
        return (
            Need("relation", what="received", at="last", rows="last", over_heads=None),
            Need("semantic", what="value_received", at="last", rows="last", over_heads=None),
            Need("values", what="values", at="last"),
        )

    def rows(self, n):
        return rows_left(self.keep, n, self.mode)

    def apply(self, params, state, tokens, evidence, ctx):
        n, valid = tokens.x.shape[1], valid_rows(tokens)
        # Shares among the image rows are their softmax alone.
        relation, semantic = (_share(evidence_rows(evidence, name, tokens, heads=True), valid[:, None]).mean(1)
                              for name in ("relation", "semantic"))  # fmt: skip
        expect("evidence", sorted(evidence) or "none", "the entry 'values'", "values" in evidence)
        scores = flow_score(relation, semantic, evidence["values"], valid=valid)
        keep = choose(scores, count_of(params, n), valid)
        return dispose(tokens, keep, self.rows(n), self.mode, self.positions), state, {"scores": scores}


@register("tokens")
def flowcut_text(keep: int, mode: str = "keep", positions: str = "original"):
    """FlowCut's cut inside the language model, used for many crops: ``keep`` image tokens by what flows to the last row
    of the prompt in the layer just done. Published after layer 1, the site "llm.2".

    mode: "keep" (gather) or "mask".  positions: rotary positions "original" or "fresh" (see ``core.reduce``).
    """
    return _FlowCutText(keep, mode, positions)
