"""MMTok: the image tokens that together cover the prompt and the image ("MMTok: Multimodal Coverage Maximization for
Efficient Inference of VLMs").

With z the prompt's embeddings, x the projector's output, c the vision tower's features, all of unit length:

    P = softmax_j(z . x_j / tau_text) / m          [m, n]   text covered by tokens
    Q = softmax_j(c . c_j / tau_vision) / n        [n, n]   image covered by tokens
    f(S) = sum_r max_{j in S} M_rj,  M = [P ; alpha Q]

f is a facility location, monotone and submodular, and K greedy steps reach (1 - 1/e) of its maximum. M has the size of
one image's tokens squared: it is built for image tokens only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxattn.core.reduce import check_budget, count_of, dispose, picked, rows_left, valid_rows
from jaxattn.core.select import greedy
from jaxattn.core.types import Array, Need, Tokens, contract, expect, operand
from jaxattn.registry import register

# Words that say how something is asked, not what about.
STOP_WORDS = frozenset(
    "a an the is are was were be been am do does did has have had can could will would should may might must "
    "i you he she it we they this that these those what which who whom whose where when why how and or but if "
    "in on at of to for from with by as question answer".split()
)
SUFFIXES = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)


def content_words(prompt: str) -> list[str]:
    """Words of a prompt that name something in the image, for tokenizing into the coverage text: the usual closing
    instructions and stop words are dropped; all words stay where nothing else is left."""
    for suffix in SUFFIXES:
        prompt = prompt.replace(suffix, " ")
    words = re.findall(r"\b\w+\b", prompt)
    return [w for w, keep in zip(words, content_mask(words), strict=True) if keep]


def content_mask(words: Sequence[str]) -> list[bool]:
    """Which of ``words`` are content words; all of them where none is."""
    mask = [w.lower() not in STOP_WORDS for w in words]
    return mask if any(mask) else [True] * len(words)


def mmtok_coverage(text: Array, vision: Array, features: Array, *, tau_text=0.02, tau_vision=0.2, alpha=0.5,
                   text_valid: Array | None = None, valid: Array | None = None) -> Array:
    """M, float32 or wider [T + N, N]: how well each token (column) covers each text token and each patch (row).

    Args:
      text: [T, D] prompt embeddings.  vision: [N, D] projector output.  features: [N, C] projector input.
      text_valid: bool [T], valid: bool [N]; other rows are absent: they neither cover nor want to be covered.
    """  # fmt: skip
    width = text.shape[-1]
    expect("vision", f"shape {vision.shape}", f"[N, {width}], the width of text", vision.shape[1:] == (width,))
    expect("features", f"{features.shape[0]} rows", f"one per token, {vision.shape[0]}", len(features) == len(vision))
    text_valid = jnp.ones(text.shape[0], bool) if text_valid is None else text_valid
    valid = jnp.ones(vision.shape[0], bool) if valid is None else valid

    def unit(x):
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    def cover(a, b, tau, live):
        # The default precision of some devices is too coarse for exponents of 1 / 0.02.
        p = jax.nn.softmax(jnp.matmul(unit(a), unit(b).T, precision="highest") / tau, axis=-1, where=valid)
        return jnp.where(live[:, None] & valid, p, 0) / jnp.maximum(live.sum(), 1)

    return jnp.concatenate([cover(text, vision, tau_text, text_valid),
                            alpha * cover(features, features, tau_vision, valid)])  # fmt: skip


def mmtok_picks(coverage: Array, k: int, *, forbidden: Array | None = None) -> Array:
    """int32 [k]: greedy picks, in their order, of the columns of ``coverage`` [R, N] that maximise the facility
    location sum_r max_j; columns where ``forbidden`` (bool [N]) are left out while others remain."""

    def gain(best):
        return jnp.sum(jax.nn.relu(coverage - best[:, None]), axis=0)

    def update(best, j):
        return jnp.maximum(best, coverage[:, j])

    start = jnp.zeros(coverage.shape[0], coverage.dtype)
    return greedy(gain, update, start, coverage.shape[1], k, forbidden=forbidden)


def mmtok_select(text: Array, vision: Array, features: Array, k: int, *, tau_text=0.02, tau_vision=0.2, alpha=0.5,
                 text_valid: Array | None = None, valid: Array | None = None, forbidden: Array | None = None) -> Array:
    """int32 [k] ascending: the tokens that MMTok keeps of one image.

    Arguments as in :func:`mmtok_coverage`; ``forbidden`` bool [N] marks tokens that still want to be covered but must
    not be kept (padding patches of the original code).
    """  # fmt: skip
    coverage = mmtok_coverage(text, vision, features, tau_text=tau_text, tau_vision=tau_vision, alpha=alpha,
                              text_valid=text_valid, valid=valid)  # fmt: skip
    if valid is not None:
        forbidden = ~valid if forbidden is None else forbidden | ~valid
    return jnp.sort(mmtok_picks(coverage, k, forbidden=forbidden))


@contract
class _MMTok:
    keep: int = operand("budget")
    tau_text: float = operand("scalar", 0.02)
    tau_vision: float = operand("scalar", 0.2)
    alpha: float = operand("scalar", 0.5)
    mode: str = "keep"
    positions: str = "original"

    def check(self):
        check_budget(self.keep, self.mode, self.positions)
        for name in ("tau_text", "tau_vision"):
            expect(name, getattr(self, name), "a temperature above 0", getattr(self, name) > 0)
        expect("alpha", self.alpha, "0 or more", self.alpha >= 0)

    def needs(self):
        return (Need("text", what="text"), Need("features", what="features"))

    def rows(self, n):
        return rows_left(self.keep, n, self.mode)

    def apply(self, params, state, tokens, evidence, ctx):
        n = tokens.x.shape[1]
        for name in ("text", "features"):
            expect("evidence", sorted(k for k in evidence if evidence[k] is not None) or "none", f"the entry {name!r}",
                   evidence.get(name) is not None)  # fmt: skip
        text, features, valid = evidence["text"], evidence["features"], valid_rows(tokens)
        ok = features.ndim == 3 and features.shape[:2] == valid.shape
        expect("evidence['features']", f"shape {tuple(features.shape)}", f"[{valid.shape[0]}, {n}, C]", ok)
        words, wanted = (text.x, text.meta.valid) if isinstance(text, Tokens) else text
        wanted = jnp.broadcast_to(wanted, words.shape[:2])
        count, k = count_of(params, n), min(rows_left(self.keep, n, "keep"), n)
        taus = {name: params[name] for name in ("tau_text", "tau_vision", "alpha")}

        def one(text, x, c, text_valid, valid):
            coverage = mmtok_coverage(text, x, c, text_valid=text_valid, valid=valid, **taus)
            return mmtok_picks(coverage, k, forbidden=~valid)

        # Only numbers of rows leave: no gradient to carry through k steps.
        words, x, features = jax.lax.stop_gradient((words, tokens.x, features))
        picks = jax.vmap(one)(words, x, features, wanted, valid)
        return dispose(tokens, picked(picks, count, valid), self.rows(n), self.mode, self.positions), state, {}


@register("tokens")
def mmtok(keep: int, tau_text: float = 0.02, tau_vision: float = 0.2, alpha: float = 0.5, mode: str = "keep",
          positions: str = "original"):
    """Keep the ``keep`` image tokens that cover prompt and image best. Acts on the projector's output.

    Args:
      tau_text, tau_vision: temperatures of the two coverage maps.  alpha: weight of the image's own coverage.
      mode: "keep" (gather) or "mask".  positions: rotary positions "original" or "fresh" (see ``core.reduce``).
    Evidence: "text", the prompt's embeddings as Tokens or as a pair (x [B, T, D], valid bool [B, T]), whose valid rows
    are the text to cover (content words only in the paper: ``content_mask``); "features" [B, N, C], projector input.
    """  # fmt: skip
    return _MMTok(keep, tau_text, tau_vision, alpha, mode, positions)
