"""Merging by threshold inside a tower's layers, and a language model that attends as if nothing was merged."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from jaxattn import tokens
from jaxattn.cache.full import full
from jaxattn.core.rope import Rope
from models import stack
from models.bind import Bound
from models.language import llm
from models.multimodal import vlm
from models.vision import vit
from tests.models.small import LLM, TOWER, VLM, images, prompts, rollout, vlm_params

D = importlib.import_module("jaxattn.tokens.dymu")  # the name is also the factory's
RNG = np.random.default_rng(0)
N = VLM.visual
NEVER, ALL = 1.5, -2.0  # thresholds
dtome = jax.jit(D.dtome, static_argnames=("least", "first"))


def steps(x, metric, size, threshold, first, least=0):
    """One merge of one image in plain loops: [(row, size, members)]."""
    rows = ["first"] * first + list(range(len(x)))
    a, b = rows[::2], rows[1::2]
    unit = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    edges = {i: max(((unit[i] @ unit[j], -n) for n, j in enumerate(b)), default=None) for i in a if i != "first"}
    ranked = sorted(edges, key=lambda i: -edges[i][0])[: (len(rows) - 1) // 2]
    merged = [i for n, i in enumerate(ranked) if edges[i][0] > threshold or n < least]
    groups = [[i] for i in a if i not in merged and i != "first"]
    for n, j in enumerate(b):
        groups.append([j] + [i for i in merged if -edges[i][1] == n])
    return [((size[g, None] * x[g]).sum(0) / size[g].sum(), size[g].sum(), g) for g in groups]


@pytest.mark.parametrize(("first", "least"), [(True, 0), (False, 2)])
def test_a_merge_by_hand(first, least):
    b, n, valid_rows = 2, 9, [9, 6]
    x, metric = (RNG.normal(size=(b, n, c)).astype(np.float32) for c in (4, 2))
    size = RNG.integers(1, 5, (b, n)).astype(np.float32)
    valid = np.arange(n) < np.array(valid_rows)[:, None]
    for threshold in (NEVER, 0.8, ALL):
        out = dtome(x, metric, threshold, size=size, least=least, first=first, valid=valid)
        rows, sizes, slot, index, live = map(np.asarray, out)
        assert rows.shape[1] == n - least
        for i, m in enumerate(valid_rows):
            want = steps(x[i, :m], metric[i, :m], size[i, :m], threshold, first, least)
            assert live[i].sum() == len(want) and live[i, : len(want)].all()
            np.testing.assert_allclose(rows[i, : len(want)], [w[0] for w in want], atol=1e-5)
            np.testing.assert_array_equal(sizes[i, : len(want)], [w[1] for w in want])
            np.testing.assert_array_equal(index[i, : len(want)], [w[2][0] for w in want])
            for s, (_, _, members) in enumerate(want):
                np.testing.assert_array_equal(np.flatnonzero(slot[i] == s), sorted(members))
            assert (slot[i, m:] == -1).all()


def test_thresholds_of_a_batch():
    """The redundant image of a batch merges more than its share."""
    metric = np.concatenate([np.ones((1, 12, 3)) + 0.01 * RNG.normal(size=(1, 12, 3)), RNG.normal(size=(1, 12, 3))])
    best, _ = D.bipartite_edges(jnp.asarray(metric))
    r = 2
    threshold = D.batch_threshold(best, 2 * r)
    ranked = np.sort(np.asarray(best).ravel())[::-1]
    assert threshold == max(ranked[2 * r], 0)
    _, _, slot, _, live = D.dtome(metric.astype(np.float32), metric, threshold)
    left = np.asarray(live).sum(-1)
    assert (24 - left.sum()) == 2 * r and 12 - left[0] > r
    assert D.batch_threshold(-jnp.ones(4), 2) == 0 and D.batch_threshold(jnp.ones(4), 4) == 0
    for kind in D.SCHEDULES:
        found = D.merge_schedule(504, 24, kind)
        assert sum(found) == 504 and len(found) == 24
        assert list(found) == sorted(found, reverse=kind != "reverse")
    assert D.merge_schedule(504, 24) == (21,) * 24 and D.merge_schedule(7, 3) == (3, 2, 2)


@partial(jax.jit, static_argnums=0)
def see(program, arrays, params, image):
    out = vit.forward(Bound(program, arrays, params), image)
    return out.pooled, out.streams.tokens("vision"), out.stack.aux


def tower(record, image):
    params = vlm_params()["vision"]
    return see(*vit.bind(TOWER, params, reduce=None if record is None else {"vision": record}), image)


def test_the_tower():
    image = images()
    plain = tower(None, image)
    same = tower(tokens.dymu(NEVER), image)  # no merges: the plain tower, in the order a then b in each layer
    np.testing.assert_allclose(same[0], plain[0], atol=1e-4)
    at = np.asarray(same[1].slot)
    np.testing.assert_allclose(np.take_along_axis(np.asarray(same[1].x), at[..., None], 1), plain[1].x, atol=1e-4)

    # Tokens alike in everything merge without a trace: proportional attention weighs them as before.
    params = vlm_params()["vision"]
    flat = {**params, "pos": jnp.zeros_like(params["pos"])}
    twice = np.full((1, 12, 12, 2), 0.3, np.float32)
    twice[:, :3] = RNG.uniform(size=(1, 3, 12, 2))  # the first line of patches differs
    a = see(*vit.bind(TOWER, flat), twice)
    b = see(*vit.bind(TOWER, flat, reduce={"vision": tokens.dymu(0.99999)}), twice)
    left = np.asarray(b[1].meta.valid).sum()
    assert left <= 4 + 2 and np.asarray(b[1].meta.size * b[1].meta.valid).sum() == N
    np.testing.assert_allclose(b[0], a[0], atol=1e-4)
    slot = np.asarray(b[1].slot)
    np.testing.assert_allclose(np.take_along_axis(np.asarray(b[1].x), slot[..., None], 1), a[1].x, atol=1e-3)

    # Calibrated on a batch, the same batch merges as many in all.
    merges = (3, 2, 1)
    _, rows, told = tower(D.dymu_calibration(merges), image)
    found = tuple(float(told[f"cut.{i}"]["threshold"]) for i in range(3))
    assert 2 * (N - sum(merges)) == np.asarray(rows.meta.valid).sum()
    again = tower(tokens.dymu(found, least=(1, 0, 1)), image)
    assert again[1].x.shape[1] == N - 2
    np.testing.assert_array_equal(np.asarray(again[1].meta.valid).sum(-1), np.asarray(rows.meta.valid).sum(-1))
    np.testing.assert_allclose(again[0], tower(tokens.dymu(found), image)[0], atol=1e-4)
    with pytest.raises(ValueError, match="thresholds: expected at most one per layer"):
        vit.bind(TOWER, None, reduce={"vision": tokens.dymu((0.9,) * 4)})


def test_unmerging_is_the_formula():
    """s_ij = (q1 k1 + q2 k2) cos(i - j) + (q1 k2 - q2 k1) sin(i - j), all of the tokens that stand at i and j."""
    b, u, n, h, g, d = 2, 5, 8, 4, 2, 6
    q, k, v = (RNG.normal(size=(b, u, heads, d)).astype(np.float32) for heads in (h, g, g))
    index = np.stack([[0, 1, 1, 2, 1, 3, 4, 4], [0, 1, 2, 3, 3, 2, 0, 4]]).astype(np.int32)
    rope = Rope(d)
    got = D.virtual_unmerge(q, k, v, index, rope)
    theta = np.asarray(rope.frequencies(), np.float64)
    want = np.zeros((b, u, h, d))
    for i in range(b):
        for head in range(h):
            qs, ks = q[i, index[i], head].astype(np.float64), k[i, index[i], head * g // h].astype(np.float64)
            (q1, q2), (k1, k2) = (np.split(x, 2, -1) for x in (qs, ks))
            turn = (np.arange(n)[:, None] - np.arange(n))[..., None] * theta
            even, odd = q1[:, None] * k1 + q2[:, None] * k2, q1[:, None] * k2 - q2[:, None] * k1
            s = (even * np.cos(turn) + odd * np.sin(turn)).sum(-1) / np.sqrt(d)
            s = np.where(np.tril(np.ones((n, n), bool)), s, -np.inf)
            p = np.exp(s - s.max(-1, keepdims=True))
            f = p / p.sum(-1, keepdims=True) @ v[i, index[i], head * g // h]
            for token in range(u):
                want[i, token, head] = f[index[i] == token].mean(0)
    np.testing.assert_allclose(got, want, atol=1e-5)


@partial(jax.jit, static_argnums=0)
def look(program, arrays, params, tokens, visual=None):
    out, visual = vlm.forward(Bound(program, arrays, params), images(), tokens, visual=visual)
    return out.logits, visual


def test_the_language_model_unmerges():
    params = vlm_params()
    bare = vlm.bind(VLM, params)
    plain, visual = look(*bare, prompts())
    unmerging = vlm.bind(VLM, params, steering=tokens.dymu_unmerge())
    np.testing.assert_allclose(look(*unmerging, prompts())[0], plain, atol=1e-4)  # nothing is merged

    # A plain model whose rows are spread again is the definition: attention layer by layer on the full sequence.
    bound = vlm.bind(VLM, params, reduce={"vision": tokens.dymu(0.5)}, steering=tokens.dymu_unmerge(), cache=full())
    logits, merged = look(bound.program, bound.arrays, bound.params, prompts())
    live = np.asarray(merged.meta.valid).sum(-1)
    assert (live < N - 2).all()
    want = definition(params["llm"], merged, prompts())
    np.testing.assert_allclose(logits, want, atol=2e-3)
    assert np.abs(np.asarray(logits) - np.asarray(plain)).max() > 1e-2

    # The cache holds the expanded rows: decoding is the whole pass.
    found = models.generate(bound, prompts(), image=images(), steps=3)
    whole = rollout(lambda x: look(*bound, x)[0], prompts(), [9, 9], 3)
    np.testing.assert_array_equal(found, whole)


def definition(p, merged, text):
    """Logits [B, T, V] by D.virtual_unmerge in every layer."""
    from jaxattn.nn import block as B

    c = LLM.block
    x = jnp.concatenate([merged.x, llm.embed(p, LLM, text)], 1)
    u, t = merged.x.shape[1], text.shape[1]
    index = np.concatenate([np.asarray(merged.slot), np.broadcast_to(u + np.arange(t), text.shape)], 1)
    for i in range(LLM.layers):
        layer = B.layer_of(p["layers"], i)
        out = D.virtual_unmerge(*B.project(layer["attn"], c, B.attention_input(layer, c, x)), index, c.rope)
        x = B.mlp_residual(layer, c, B.attention_residual(layer, c, x, out))
    return llm.head(p, LLM, B.norm(p["norm"], c, x[:, u:]))


def test_what_does_not_go_together():
    reduce = {"llm": tokens.transprune((2,), (0.5,), accumulate=(2,))}
    bound = vlm.bind(VLM, vlm_params(), reduce=reduce, steering=tokens.dymu_unmerge())
    with pytest.raises(ValueError, match="needs: expected none of a layer in which rows are unmerged"):
        jax.eval_shape(lambda: look(*bound, prompts()))
    streams = stack.streams_of({"text": (jnp.zeros((1, 4, 2)), llm.text_meta(jnp.zeros((1, 4), int)))})
    np.testing.assert_array_equal(streams.places().row, [[0, 1, 2, 3]])
