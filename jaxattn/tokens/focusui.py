"""FocusUI: drop what an instruction does not need, without tearing positions ("FocusUI: Efficient UI Grounding via
Position-Preserving Visual Token Selection").

``patch_scores``: image and instruction tokens each pass an enhancer E(x) = MLP(LN(x + MHA(x, x, x))); after tanh and
scaling to unit length, s_i = mean_t <v_i, t>. Trained against ``fused_label``, the share of a patch inside the target's
box and the rarity of the plain region it lies in, by KL(softmax(label) || softmax(s)).

``focusui`` keeps int(N (1 - r)) image tokens and puts one learned marker row where a run of consecutive tokens was
dropped, at the place and with the rotary position of the run's last token, so that positions keep their meaning.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core.attend import attend
from jaxattn.core.reduce import check_budget, choose, reduce_merge, valid_rows
from jaxattn.core.select import gather_tokens
from jaxattn.core.slots import compact
from jaxattn.core.types import Array, Meta, Need, Spec, Tokens, contract, expect, operand
from jaxattn.registry import register

HEADS = 8


# --------------------------------------------------------------------------------------------------------------- scorer
def init_enhancer(key, dim: int) -> dict:
    """Parameters of one enhancer of width ``dim``: qkv, out and up, down as {kernel, bias}, and norm {scale, bias}."""
    expect("dim", dim, f"a multiple of the {HEADS} heads", dim % HEADS == 0)
    keys = jax.random.split(key, 4)

    def dense(key, wide):
        bound = dim**-0.5
        return {"kernel": jax.random.uniform(key, (dim, wide), minval=-bound, maxval=bound), "bias": jnp.zeros(wide)}

    norm = {"scale": jnp.ones(dim), "bias": jnp.zeros(dim)}
    shapes = (("qkv", 3 * dim), ("out", dim), ("up", dim), ("down", dim))
    return {"norm": norm} | {name: dense(k, wide) for k, (name, wide) in zip(keys, shapes, strict=True)}


def _dense(p: dict, x: Array) -> Array:
    return x @ p["kernel"].astype(x.dtype) + p["bias"].astype(x.dtype)


def _attended(p: dict, x: Array, valid: Array) -> Array:
    """LN(x + MHA(x, x, x)) of rows x [B, N, D], at least float32."""
    b, n, d = x.shape
    q, k, v = (a.reshape(b, n, HEADS, d // HEADS) for a in jnp.split(_dense(p["qkv"], x), 3, axis=-1))
    meta = Meta.of(n, valid=valid)
    mixed = attend(q, k, v, q_meta=meta, k_meta=meta).out.reshape(b, n, d)
    x = (x + _dense(p["out"], mixed)).astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = x - x.mean(-1, keepdims=True)
    x = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
    return x * p["norm"]["scale"] + p["norm"]["bias"]


def enhance(p: dict, x: Array, valid: Array) -> Array:
    """MLP(LN(x + MHA(x, x, x))) of rows x [B, N, D]; valid bool [B, N]. There is no residual around the MLP."""
    return _dense(p["down"], jax.nn.gelu(_dense(p["up"], _attended(p, x, valid)), approximate=False))


def patch_scores(params: dict, vision: Array, text: Array, valid: Array, text_valid: Array, *, over: str = "mean") -> Array:
    """s float32 [B, N]: similarity of image tokens [B, N, D] to instruction tokens [B, T, D].

    params: {"vision", "text"}: two enhancers.  valid, text_valid: bool [B, N], [B, T].  over: "mean" or "max" of t.
    """
    expect("over", repr(over), "'mean' or 'max'", over in ("mean", "max"))

    def unit(side, x, valid):
        x = jnp.tanh(enhance(params[side], x, valid))
        square = jnp.square(x).sum(-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0))

    v, t = unit("vision", vision, valid), unit("text", text, text_valid)
    if over == "mean":  # of products with each word: the product with the words' mean
        words = jnp.where(text_valid[..., None], t, 0).sum(1) / jnp.maximum(text_valid.sum(-1), 1)[:, None]
        return jnp.einsum("bnd,bd->bn", v, words)

    def word(most, one):
        t, live = one
        return jnp.where(live[:, None], jnp.maximum(most, jnp.einsum("bnd,bd->bn", v, t)), most), None

    start = jnp.full(vision.shape[:2], -jnp.inf, v.dtype)
    return jax.lax.scan(word, start, (jnp.moveaxis(t, 1, 0), text_valid.T))[0]


# --------------------------------------------------------------------------------------------------------------- labels
def box_share(box, grid: tuple[int, int], patch: int) -> np.ndarray:
    """[h, w] share of each patch of ``patch`` pixels inside ``box`` (left, top, right, bottom) in pixels."""
    left, top, right, bottom = box
    rows, cols = (np.arange(n) * patch for n in grid)
    tall = np.clip(np.minimum(rows + patch, bottom) - np.maximum(rows, top), 0, patch)
    wide = np.clip(np.minimum(cols + patch, right) - np.maximum(cols, left), 0, patch)
    return tall[:, None] * wide[None, :] / patch**2


def region_weight(blocks: np.ndarray, threshold: float = 2.0) -> np.ndarray:
    """[h, w] rarity of the region of each block: 1 / max(1, ln(count + 1)), count the blocks of its region.

    blocks: [h, w, values], pixels of each merged block in [0, 1]; neighbours to the right and below belong together
    where the L2 norm of their difference is below ``threshold`` (published for 4704 values: both frames of 28 x 28 x 3).
    """
    blocks = np.asarray(blocks, np.float64)
    h, w = blocks.shape[:2]
    across = np.linalg.norm(blocks[:, 1:] - blocks[:, :-1], axis=-1) < threshold
    down = np.linalg.norm(blocks[1:] - blocks[:-1], axis=-1) < threshold
    region = np.arange(h * w).reshape(h, w)
    while True:  # every block takes the least number among its region's neighbours until nothing changes
        new = region.copy()
        for a, b, joined in (
            (new[:, :-1], new[:, 1:], across),
            (new[:-1], new[1:], down),
        ):
            least = np.minimum(a, b)
            a[joined] = least[joined]
            b[joined] = np.minimum(b, least)[joined]
        if (new == region).all():
            break
        region = new
    count = np.bincount(region.reshape(-1), minlength=h * w)[region]
    return 1 / np.maximum(1, np.log(count + 1))


def fused_label(box: np.ndarray, region: np.ndarray, *, box_weight: float = 1.0, region_weight: float = 0.5) -> np.ndarray:
    """Labels in [-1, 1] of merged tokens [h / 2, w / 2]: clip(box + region / 2, 0, 1) * 2 - 1, mean over 2 x 2 patches.
    box: [h, w] per patch.  region: [h / 2, w / 2] per merged block."""
    box = np.asarray(box)
    h, w = box.shape
    fused = box_weight * box + region_weight * np.repeat(np.repeat(region, 2, 0), 2, 1)
    fused = np.clip(fused, 0, 1) * 2 - 1
    return fused.reshape(h // 2, 2, w // 2, 2).mean((1, 3))


def scorer_loss(scores: Array, label: Array, valid: Array | None = None) -> Array:
    """KL(softmax(label) || softmax(scores)) over the tokens [B, N], mean over the batch."""
    valid = jnp.ones(scores.shape, bool) if valid is None else valid
    low = jnp.finfo(scores.dtype).min
    q, p = (jax.nn.log_softmax(jnp.where(valid, x, low), -1) for x in (scores, label.astype(scores.dtype)))
    return jnp.where(valid, jnp.exp(p) * (p - q), 0).sum(-1).mean()


# ------------------------------------------------------------------------------------------------------------ selection
def tie_seed(ids: Array) -> Array:
    """uint32 [B] seed of a prompt's tokens [B, T]: (sum * 1315423911) mod (2^31 - 1)."""
    m = 2**31 - 1
    total = np.asarray(ids, np.int64).sum(-1) % m
    return ((total * 1315423911) % m).astype(np.uint32)


def focusui_keep(scores: Array, ratio: float, *, valid: Array | None = None, seed: Array | None = None) -> Array:
    """bool [B, N]: the int(N (1 - ratio)) tokens of largest score, N the valid ones.

    seed: uint32 [B] or scalar (``tie_seed``): equal scores go by a permutation drawn from it; None: by index."""
    valid = jnp.ones(scores.shape, bool) if valid is None else valid
    count = jnp.floor(valid.sum(-1) * (1 - ratio) + 1e-4).astype(jnp.int32)
    if seed is None:
        return choose(scores, count, valid)
    b, n = scores.shape
    seed = jnp.broadcast_to(jnp.asarray(seed), (b,))
    order = jax.vmap(lambda s: jax.random.permutation(jax.random.key(s), n))(seed)
    shuffled = choose(gather_tokens(scores, order), count, gather_tokens(valid, order))
    return jax.vmap(lambda keep, at: jnp.zeros(n, bool).at[at].set(keep))(shuffled, order)


def run_ends(keep: Array, valid: Array | None = None) -> Array:
    """bool [B, N]: the last token of every run of consecutive dropped ones (rows that are not valid are not there)."""
    valid = jnp.ones(keep.shape, bool) if valid is None else valid
    n = keep.shape[1]
    # The next valid row's number, from the back.
    number = jnp.where(valid, jnp.arange(n), n)
    following = jax.lax.cummin(jnp.concatenate([number[:, 1:], jnp.full_like(number[:, :1], n)], 1), axis=1, reverse=True)
    next_kept = jnp.where(following < n, gather_tokens(keep, jnp.minimum(following, n - 1)), True)
    return valid & ~keep & next_kept


@contract
class _FocusUI:
    ratio: float = operand("scalar", 0.5)
    capacity: int | None = None
    over: str = "mean"
    marker: bool = True
    seed: int | None = operand("int", None)
    drawn: float = 0.0

    def check(self):
        expect("ratio", self.ratio, "a share of dropped tokens in [0, 1]", 0 <= self.ratio <= 1)
        expect("over", repr(self.over), "'mean' or 'max'", self.over in ("mean", "max"))
        expect("drawn", self.drawn, "a share of dropped tokens in [0, 1]", 0 <= self.drawn <= 1)
        if self.capacity is not None:
            check_budget(self.capacity)

    def init(self, key, spec: Spec) -> dict:
        """vision, text: enhancers of the language model's width; marker [D]."""
        a, b, c = jax.random.split(key, 3)
        return {"vision": init_enhancer(a, spec.dim), "text": init_enhancer(b, spec.dim),
                "marker": 0.02 * jax.random.normal(c, (spec.dim,))}  # fmt: skip

    def needs(self):
        return (Need("text", what="text"),)

    def rows(self, n):
        return n if self.capacity is None else min(n, self.capacity)

    def apply(self, params, state, tokens, evidence, ctx):
        valid, n = valid_rows(tokens), tokens.x.shape[1]
        text = evidence.get("text")
        expect("evidence", sorted(evidence) or "none", "the entry 'text', the prompt's embeddings", text is not None)
        text, text_valid = (text.x, text.meta.valid) if isinstance(text, Tokens) else text
        text_valid = jnp.broadcast_to(text_valid, text.shape[:2])
        scores = patch_scores(params, tokens.x, text, valid, text_valid, over=self.over)
        ratio = params["ratio"]
        if self.drawn and ctx.phase == "train" and ctx.key is not None:
            ratio = jax.random.uniform(ctx.key, (), maxval=self.drawn)
        keep = focusui_keep(scores, ratio, valid=valid, seed=params.get("seed"))
        ends = run_ends(keep, valid) if self.marker else jnp.zeros_like(keep)
        stays, left = keep | ends, self.rows(n)
        index, live = compact(stays, left)
        x = jnp.where(ends[..., None], params["marker"].astype(tokens.x.dtype), tokens.x)
        # A dropped token went into its run's marker: the first row at or behind it that stays.
        place = jnp.cumsum(stays, axis=-1) - stays
        slot = jnp.where((keep | self.marker) & (place < left), place, -1)
        out = reduce_merge(tokens, gather_tokens(x, index), slot.astype(jnp.int32), index, live)
        return out, state, {"scores": scores, "kept": keep, "markers": ends}


@register("tokens")
def focusui(ratio: float = 0.5, capacity: int | None = None, over: str = "mean", marker: bool = True,
            seed: int | None = None, drawn: float = 0.0):
    """Drop a share of the image tokens by a trained scorer, with one marker per dropped run. For the site "project".

    Args:
      ratio: share of image tokens to drop; an operand.
      drawn: in training each step draws its ratio from U(0, drawn) instead (published: 0.95); 0: it does not.
      capacity: static number of rows that leave, at least the kept ones and the markers (``focusui_rows``), which shortens
        the arrays; None: as many as came, those behind the last used one not valid.
      over: "mean" or "max" similarity to the instruction.  marker: False drops runs without a trace.
      seed: of the permutation that breaks ties, ``tie_seed`` of the prompt; None: the lowest index.
    Original rotary positions stay. Its parameters (two enhancers and the marker) are trained arrays of the bound model.
    """  # fmt: skip
    return _FocusUI(ratio, capacity, over, marker, seed, float(drawn))


def focusui_rows(n: int, ratio: float) -> int:
    """Most rows that ``focusui`` leaves of ``n``: the kept ones and a marker before, between and behind them."""
    kept = int(n * (1 - ratio) + 1e-4)
    return kept + min(n - kept, kept + 1)


# -------------------------------------------------------------------------------------------------------------- pointer
def pointer_logits(params: dict, vision: Array, target: Array, valid: Array) -> Array:
    """float32 [B, N]: where the target is, of image tokens [B, N, D] and the target's hidden row [B, D].

    params: {"enhancer": an ``init_enhancer`` of which qkv, out and norm are used, "vision", "target": {kernel, bias}}.
    The softmax over valid tokens is trained against ``pointer_target``."""
    x = _attended(params["enhancer"], vision, valid)
    s = jnp.einsum("bnd,bd->bn", _dense(params["vision"], x), _dense(params["target"], target)) * vision.shape[-1] ** -0.5
    return jnp.where(valid, s.astype(jnp.float32), jnp.finfo(jnp.float32).min)


def pointer_target(inside: Array, keep: Array) -> Array:
    """[B, N] distribution over the kept tokens whose patch lies in the target's box (bool [B, N]); 0 where none is left."""
    live = (inside & keep).astype(jnp.float32)
    return live / jnp.maximum(live.sum(-1, keepdims=True), 1)
