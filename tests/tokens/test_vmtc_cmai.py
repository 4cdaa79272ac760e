"""Condensed patches, and text rows that lose the image tokens they do not look at."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import tokens
from jaxattn.cache.full import full
from jaxattn.core import mask as masks
from jaxattn.core.attend import attend_call, make_call
from jaxattn.core.slots import kmeans
from jaxattn.core.types import Ctx, Meta, Spec, State, split
from jaxattn.nn import block as B
from jaxattn.tokens import vmtc_cmai as V
from models.bind import Bound
from models.language import llm
from models.multimodal import vlm
from tests.models.small import LLM, VLM, images, prompts, vlm_params

generation = importlib.import_module("models.generate")
RNG = np.random.default_rng(0)
T = 9
condense = jax.jit(V.vmtc_condense, static_argnums=(3, 4), static_argnames="metric")


def test_kmeans_is_lloyd():
    x = RNG.normal(size=(2, 14, 3)).astype(np.float32)
    rest = np.ones((2, 14), bool)
    rest[0, [1, 5]] = False
    for metric in ("l2", "cosine"):
        slot = np.asarray(kmeans(x, rest, 4, 5, metric=metric))
        for b in range(2):
            rows = np.flatnonzero(rest[b])
            y = x[b] / np.linalg.norm(x[b], axis=-1, keepdims=True) if metric == "cosine" else x[b]
            centres = y[rows[:: len(rows) // 4][:4]]
            for _ in range(6):
                near = ((y[rows, None] - centres) ** 2).sum(-1).argmin(-1)
                centres = np.stack([y[rows[near == k]].mean(0) if (near == k).any() else centres[k] for k in range(4)])
            np.testing.assert_array_equal(slot[b, rows], near)
        assert (slot[~rest] == -1).all()


def test_condensed_rows():
    x, scores = RNG.normal(size=(2, 12, 4)).astype(np.float32), RNG.uniform(size=(2, 12)).astype(np.float32)
    rows, slot, index, live = map(np.asarray, condense(x, scores, 4, 3, 7, metric="l2"))
    for b in range(2):
        primary = set(np.argsort(-scores[b])[:4].tolist())
        assert primary <= set(index[b][live[b]].tolist()) and (np.diff(index[b][live[b]]) > 0).all()
        for s in np.flatnonzero(live[b]):
            members = np.flatnonzero(slot[b] == s)
            np.testing.assert_allclose(rows[b, s], x[b, members].mean(0), atol=1e-6)
            assert members[0] == index[b, s] and (len(members) == 1 or not primary & set(members.tolist()))
    rows, slot, _, live = condense(x, scores, 4, 8, 12, metric="l2")  # as many clusters as rows: lossless
    assert np.asarray(live).all()
    np.testing.assert_allclose(np.take_along_axis(np.asarray(rows), np.asarray(slot)[..., None], 1), x, atol=1e-6)


def test_inhibited_pairs():
    a = RNG.dirichlet(np.ones(T), size=(2, T)).astype(np.float32)
    i = RNG.uniform(size=(2, T, 7)).astype(np.float32)
    np.testing.assert_allclose(V.cmai_focus(a, i)[1, 3], sum(a[1, 3, s] * i[1, s] for s in range(T)), rtol=1e-5)
    np.testing.assert_allclose(V.cmai_focus(np.eye(T, dtype=np.float32), i), i, rtol=1e-6)
    image = np.arange(7) > 0
    assert not np.asarray(V.cmai_inhibited(i, image, 0.0)).any()
    got = np.asarray(V.cmai_inhibited(i, image, 0.5))
    low = np.argsort(i[..., 1:], -1)[..., :3] + 1
    assert (got.sum(-1) == 3).all() and np.take_along_axis(got, low, -1).all()
    every = np.asarray(V.cmai_inhibited(i, image, 1.0))
    assert (every.sum(-1) == 5).all() and not np.take_along_axis(every, i[..., 1:].argmax(-1)[..., None] + 1, -1).any()
    mean = np.asarray(V.cmai_inhibited(i, image, 0.0, "mean"))
    np.testing.assert_array_equal(mean, (i < i[..., 1:].mean(-1, keepdims=True)) & image)
    pairs = RNG.uniform(size=(2, 53, 6)) < 0.5
    words = np.asarray(V.pack(pairs)).astype(int)
    back = (words[:, :, np.arange(53) // V.BITS] >> (np.arange(53) % V.BITS)) & 1
    np.testing.assert_array_equal(back.swapaxes(1, 2) == 1, pairs)


@partial(jax.jit, static_argnums=0)
def look(program, arrays, params, tokens):
    out, visual = vlm.forward(Bound(program, arrays, params), images(), tokens)
    return out.logits, visual


def definition(p, visual, text, rho, first):
    """Logits with whole maps: pairs inhibited by the layer above, from layer ``first`` on."""
    c = LLM.block
    x = jnp.concatenate([visual.x, llm.embed(p, LLM, text)], 1)
    n, u = x.shape[1], visual.x.shape[1]
    hidden = np.zeros((len(x), n, n), bool)
    for i in range(LLM.layers):
        layer = B.layer_of(p["layers"], i)
        q, k, v = B.project(layer["attn"], c, B.attention_input(layer, c, x))
        q, k = (c.rope.apply(a, jnp.arange(n)[None]) for a in (q, k))
        k, v = (jnp.repeat(a, c.heads // c.kv_heads, 2) for a in (k, v))
        s = jnp.einsum("bihd,bjhd->bhij", q, k) * c.head_dim**-0.5
        s = jnp.where(np.tril(np.ones((n, n), bool)) & ~hidden[:, None], s, -jnp.inf)
        a = jax.nn.softmax(s, -1)
        mean = np.asarray(a.mean(1))
        focus = np.einsum("bts,bsn->btn", mean[:, u:, u:], mean[:, u:, :u])
        hidden = np.zeros_like(hidden)
        if i + 1 >= first:
            order = np.argsort(np.argsort(-focus, -1, kind="stable"), -1)
            hidden[:, u:, :u] = (order >= u - int(rho * u)) & (order > 0)
        x = B.mlp_residual(layer, c, B.attention_residual(layer, c, x, jnp.einsum("bhij,bjhd->bihd", a, v)))
    return llm.head(p, LLM, B.norm(p["norm"], c, x[:, u:]))


def test_the_language_model_is_inhibited():
    params = vlm_params()
    plain, visual = look(*vlm.bind(VLM, params), prompts())
    none = vlm.bind(VLM, params, steering=tokens.cmai(0.0))
    np.testing.assert_allclose(look(*none, prompts())[0], plain, atol=1e-4)
    for first, layers in ((2, None), (1, (1, 2, 3, 4, 5))):
        bound = vlm.bind(VLM, params, steering=tokens.cmai(0.5, layers))
        want = definition(params["llm"], visual, prompts(), 0.5, first)
        np.testing.assert_allclose(look(*bound, prompts())[0], want, atol=2e-3)
    assert np.abs(np.asarray(want) - np.asarray(plain)).max() > 1e-2


def test_inhibited_pairs_have_no_weight():
    """Probabilities of one layer, read off through values that are unit vectors."""
    u, t, h = 6, 30, 2
    n = u + t
    q, k = (RNG.normal(size=(1, n, h, 4)).astype(np.float32) for _ in range(2))
    v = np.broadcast_to(np.eye(n, dtype=np.float32)[:, None], (1, n, h, n))
    kind = np.concatenate([np.ones(u), np.zeros(t)]).astype(np.int32)[None]
    pairs = np.zeros((1, t, n), bool)
    pairs[0, [0, 25, 25, 29], [2, 0, 5, 3]] = True
    program, params = split(tokens.cmai(0.5), Spec(layers=4, heads=h))
    call = make_call(q, k, v, k_meta=Meta.of(n, kind=kind), mask=masks.causal())
    ctx = Ctx(layer=2, phase="prefill", groups=(("vision", 0, u), ("text", u, n)))
    plain = np.asarray(attend_call(call)[0].out)
    got = np.asarray(attend_call(program.call(params, State(shared=V.pack(pairs)), call, ctx))[0].out)
    hidden = np.zeros((1, n, 1, n), bool)
    hidden[:, u:, 0] = pairs
    want = np.where(hidden, 0, plain)
    np.testing.assert_allclose(got, want / want.sum(-1, keepdims=True), atol=1e-6)
    assert (got[np.broadcast_to(hidden, got.shape)] == 0).all()


def test_decoded_rows_do_as_the_last_row():
    """A generation's first step attends as the prompt's last row was allowed to."""
    params = vlm_params()
    bound = vlm.bind(VLM, params, steering=tokens.cmai(0.5), cache=full(), reduce={"vision": tokens.vmtc(6, 4, layer=1)})
    free = vlm.bind(VLM, params, steering=tokens.cmai(0.0), cache=full(), reduce={"vision": tokens.vmtc(6, 4, layer=1)})
    step = jax.jit(lambda arrays, state: generation.decode(bound._replace(arrays=arrays), state))
    start = jax.jit(lambda arrays: generation.prefill(bound._replace(arrays=arrays), prompts(), image=images(), max_new=2)[1])
    state = start(bound.arrays)
    side = [c.state.layer.side["cmai"] for c in state.caches]
    flags = np.concatenate([np.asarray(s) for s in side])[:, :, 0]  # [L, B, W]
    assert flags[:2].sum() == 0 and (flags[2:].sum(-1) == 10 // 2).all()  # the first two layers are free
    inhibited, _ = step(bound.arrays, state)
    assert np.abs(np.asarray(step(free.arrays, start(free.arrays))[0]) - np.asarray(inhibited)).max() > 1e-3


def test_what_is_refused():
    with pytest.raises(ValueError, match="rho: expected a share"):
        tokens.cmai(1.5)
    with pytest.raises(ValueError, match="metric: expected"):
        kmeans(np.zeros((1, 4, 2), np.float32), np.ones((1, 4), bool), 2, metric="l1")
