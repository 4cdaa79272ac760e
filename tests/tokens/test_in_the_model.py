"""Methods bound to a vision-language model: they find their evidence, shorten what later layers see, and gather as they
mask."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import tokens
from jaxattn.cache.full import full
from jaxattn.core import mask as masks
from jaxattn.core.attend import make_call
from jaxattn.core.types import Meta, Need, State
from jaxattn.tokens.vflowopt import importance_need
from models import caches, stack
from models import evidence as ev
from models.bind import Bound
from models.language import llm
from models.multimodal import vlm
from models.vision import vit

CONFIG = vlm.VLMConfig(vit.config(24, 4, 4, 16, 2, hidden=16), llm.tiny(vocab=24, layers=4, dim=16, hidden=16), 16)
B, N, T = 2, 36, 5
RNG = np.random.default_rng(0)
IMAGE = RNG.uniform(size=(B, 24, 24, 3)).astype(np.float32)
TEXT = RNG.integers(1, 24, (B, T)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: 2 * x, vlm.init(CONFIG))


@partial(jax.jit, static_argnums=0, static_argnames="phase")
def run(program, arrays, params, image, text, phase):
    out, visual = vlm.forward(Bound(program, arrays, params), image, text, phase=phase)
    image_rows = out.stack.streams.tokens("vision")
    return out.logits, image_rows, visual, out.stack.caches


def forward(params, reduce, text=TEXT, phase="train", **sockets):
    return run(*vlm.bind(CONFIG, params, reduce=reduce, **sockets), IMAGE, text, phase=phase)


def test_flowcut_zoo_prune_transprune(params):
    found = []
    for mode in ("keep", "mask"):
        stages = tokens.transprune((1, 2), (0.75, 0.5), accumulate=(1, 2), mode=mode, positions="original")
        reduce = {"vision": tokens.flowcut(16), "project": tokens.zoo_prune(8, directions=4), "llm": stages}
        logits, rows, visual, _ = forward(params, reduce)
        assert visual.features.shape[1] == 16 and visual.x.shape[1] == 8
        assert rows.x.shape[1] == (4 if mode == "keep" else 8) and (np.asarray(rows.meta.valid).sum(-1) == 4).all()
        found.append((np.asarray(logits), np.sort(np.asarray(rows.slot >= 0), -1)))
    np.testing.assert_allclose(*(x for x, _ in found), atol=1e-4)
    np.testing.assert_array_equal(*(x for _, x in found))


def test_visiondrop_hears_no_text(params):
    reduce = {"vision": tokens.visiondrop(12, 4), "llm": tokens.visiondrop_stages(((8, 2), (5, 1)), (1, 2))}
    a, b = (forward(params, reduce, text) for text in (TEXT, (TEXT + 7) % 24))
    assert a[2].x.shape[1] == 16 and a[1].x.shape[1] == 6 and np.isfinite(a[0]).all()
    np.testing.assert_array_equal(a[1].slot, b[1].slot)
    assert np.abs(np.asarray(a[0]) - np.asarray(b[0])).max() > 1e-3


def test_mustdrop_and_its_cache(params):
    merge = tokens.mustdrop_merge(2.0, least=2)
    reduce = {"vision.1": merge, "vision": tokens.mustdrop_keys(0.2),
              "llm": tokens.mustdrop(0.05, 0.1, layers=(0, 1), capacity=(14, 10))}  # fmt: skip
    logits, rows, visual, caches = forward(params, reduce, phase="prefill", cache=full())
    assert visual.x.shape[1] == N - 16 and rows.x.shape[1] == 10 and np.isfinite(logits).all()
    keys = np.asarray(visual.meta.labels["protected"])
    assert (keys.sum(-1) == np.ceil(0.2 * 19)).all()
    assert (np.asarray(rows.meta.labels["protected"] * rows.meta.valid).sum(-1) == keys.sum(-1)).all()
    left = np.asarray(rows.meta.valid).sum(-1)
    image = jnp.broadcast_to(visual.meta.pos, (B, N - 16))
    for cache in caches:
        slots = tokens.mustdrop_trim(cache.state.layer, rows.meta, image)
        np.testing.assert_array_equal(slots.meta.valid.sum(-1)[:, :, 0], np.broadcast_to(left + T, slots.meta.valid.shape[:2]))


def test_todre_reads_a_layer_behind_the_select_layer(params):
    found = {}
    for tau in (0.0, 1.1):
        reduce = {"project": tokens.todre(12), "llm": tokens.todre_exit(tau, layer=1)}
        logits, rows, visual, _ = forward(params, reduce)
        assert visual.x.shape[1] == 12 and (np.asarray(rows.meta.valid) == (tau == 0)).all()
        found[tau] = np.asarray(logits)
    dense = forward(params, {"project": tokens.todre(12)})[0]
    np.testing.assert_allclose(found[0.0], dense, atol=1e-5)
    assert np.abs(found[1.1] - dense).max() > 1e-3 and np.isfinite(found[1.1]).all()


def test_the_others(params):
    for reduce, rows in (
        ({"vision": tokens.vflowopt(0.5, 3.0, 1.0), "llm": tokens.vflowopt_stages((0.75, 0.5), (1, 2), threshold=1.0),
          "llm.3": tokens.attention_debiasing(tokens.fastv(4), decay=0.01)}, 4),
        ({"vision": tokens.vtc_cls(24), "project": tokens.holov(16, crops=4), "llm.2": tokens.flowcut_text(8)}, 8),
    ):  # fmt: skip
        logits, left, _, _ = forward(params, reduce)
        assert left.x.shape[1] == rows and np.isfinite(logits).all()
        assert (np.asarray(left.meta.valid).sum(-1) == rows).all()


def test_evidence_against_the_map():
    """Kinds of evidence that these methods brought, from a causal call with grouped heads and a row of padding."""
    n, h, g, d = 9, 4, 2, 6
    q, k, v = (RNG.normal(size=(B, n, heads, d)).astype(np.float32) for heads in (h, g, g))
    valid = np.ones((B, n), bool)
    valid[1, 2] = False
    meta = Meta.of(n, pos=np.broadcast_to(np.arange(n, dtype=np.int32), (B, n)), valid=valid)
    call = make_call(q, k, v, mask=masks.causal()).replace(q_meta=meta, k_meta=meta)
    groups = {"vision": (0, 5), "text": (5, 9)}
    see = np.tril(np.ones((n, n), bool)) & valid[:, None, None, :]

    def probs(q, k, scale=d**-0.5):
        s = np.where(see, np.einsum("bihd,bjhd->bhij", q, np.repeat(k, h // g, 2)) * scale, -np.inf)
        e = np.exp(s - s.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True) * valid[:, None, :, None]

    def ask(**need):
        need = Need("x", **need) if "name" not in need else need.pop("name")
        return jax.jit(lambda call: ev.answer(need, call, None, hidden=q, k_raw=k, groups=groups, evidence={}))(call)

    p = probs(q, k)
    rows = [p[:, :, a:b].mean(1).sum(1) / valid[:, a:b].sum(1, keepdims=True) for a, b in groups.values()]
    want = np.stack([np.stack([r[:, a:b].sum(-1) for a, b in groups.values()], -1) for r in rows], 1)
    np.testing.assert_allclose(ask(what="between"), want, atol=1e-5)
    for what, scale in (("value_received", d**-0.5), ("raw_value_received", 1.0)):
        want = probs(np.repeat(v, h // g, 2), v, scale)[:, :, -1]
        np.testing.assert_allclose(ask(what=what, rows="last", over_heads=None), want, atol=1e-5)
    np.testing.assert_array_equal(ask(what="values"), v)
    received = p.mean(1).sum(1) / valid.sum(1, keepdims=True)
    chosen = (received > 1.2 * (received.sum(-1) / valid.sum(-1))[:, None]) & valid
    want = np.stack([p[b].mean(0)[chosen[b]].mean(0) for b in range(B)])
    np.testing.assert_allclose(ask(name=importance_need(0, 1.2)), want, atol=1e-5)


def test_renumbered_segments_keep_their_caches():
    """Five segments, each with positions of its own, as four renumbering cuts leave them: none can be joined."""
    rows = [np.zeros((1, B, 2, n, 4), np.float32) for n in (9, 8, 7, 6, 5)]
    shifts = [None, *(jnp.full(B, i) for i in range(1, 5))]
    apart = [stack.CacheStack(State(x), s, i, i + 1) for i, (x, s) in enumerate(zip(rows, shifts, strict=True))]
    assert len(caches.join_caches(apart)) == 5
    alike = [c.replace(shift=None) for c in apart]
    assert len(caches.join_caches(alike)) == caches.MAX_CACHES


def test_facts_follow_and_come_back():
    slot = np.array([[0, 1, 0, -1, 2], [2, 2, 2, 1, 0]])
    fact = RNG.exponential(size=(2, 3, 3)).astype(np.float32)
    spread = ev.unfollow(fact, slot)
    for how in ("sum", "max"):
        np.testing.assert_allclose(ev.follow(spread, slot, 3, how), fact)
