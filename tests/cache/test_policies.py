"""Cache policies: exact where nothing is dropped, the right rows where something is, steps that copy nothing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.cache.duoattention import duoattention, retrieval_heads
from jaxattn.cache.full import full
from jaxattn.cache.h2o import h2o, h2o_mask
from jaxattn.cache.streamingllm import evict_range, streamingllm
from jaxattn.cache.tidaldecode import tidaldecode
from jaxattn.core.types import Meta, split
from tests.cache.harness import Stream, random_weights, step, turn

LAYERS, DIM, HEADS, KV, D = 3, 24, 4, 2, 6
N, T = 9, 14


@pytest.fixture(scope="module")
def weights():
    return random_weights(np.random.default_rng(1), LAYERS, DIM, HEADS, KV, D)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(2).normal(size=(2, T, DIM)).astype(np.float32)


def stream(policy, weights, batch=2, length=T + 2, **more):
    return Stream(policy, weights, heads=HEADS, kv_heads=KV, length=length, batch=batch, **more)


def outputs(policy, weights, x, cuts=(0, N, N + 2, *range(N + 3, T + 1)), **more):
    """[L, B, T, C] of a prompt, a chunk and single tokens."""
    s = stream(policy, weights, x.shape[0], **more)
    return np.concatenate([s.feed(x[:, a:b]) for a, b in zip(cuts, cuts[1:], strict=False)], 2), s


@pytest.fixture(scope="module")
def dense(weights, x):
    """One pass over the whole text, without a cache."""
    return np.asarray(stream(full(), weights).feed(x))


RETRIEVAL = np.array([[True, False], [False, False], [True, True]])  # uneven: spare full slots in two layers
GENEROUS = {
    "duoattention": duoattention(RETRIEVAL, sink=4, recent=32),
    "full": full(),
    "streamingllm": streamingllm(4, 64),
    "h2o": h2o(32, 32),
    "h2o rank": h2o(32, 32, positions="rank"),
    "h2o mask": h2o_mask(32, 32),
    "tidaldecode kv": tidaldecode(64, (0, 2), per="kv", reduce="sum"),
}
SMALL = {
    "duoattention": duoattention(RETRIEVAL, sink=2, recent=4),
    "full": full(),
    "streamingllm": streamingllm(2, 4),
    "h2o": h2o(3, 4),
    "h2o rank": h2o(3, 4, positions="rank"),
    "h2o mask": h2o_mask(3, 4),
    "tidaldecode": tidaldecode(4, (0, 2)),
    "tidaldecode kv": tidaldecode(4, (0,), per="kv"),
}


@pytest.mark.parametrize("name", GENEROUS)
def test_a_budget_for_everything_is_dense(name, weights, x, dense):
    found, _ = outputs(GENEROUS[name], weights, x)
    np.testing.assert_allclose(found, dense, atol=2e-5)


@pytest.mark.parametrize("name", ["full", "streamingllm", "h2o rank", "h2o mask", "tidaldecode", "duoattention"])
def test_batch_rows_are_independent_and_padding_is_never_seen(name, weights, x):
    """A short prompt padded on the right, beside a long one, is the short prompt alone."""
    alone, beside = stream(SMALL[name], weights), stream(SMALL[name], weights)
    valid = np.ones((2, N), bool)
    valid[0, 6:] = False
    padded = x[:, :N].copy()
    padded[0, 6:] = 1e3
    first = x[[0, 0]]
    np.testing.assert_allclose(beside.feed(padded, valid=valid)[:, 0, :6], alone.feed(first[:, :6])[:, 1], atol=2e-5)
    for t in range(3):
        if t == 1:  # a step in which only the other text goes on
            beside.feed(np.full((2, 1, DIM), 1e3, np.float32), valid=np.array([[False], [True]]))
        both = np.stack([x[0, 6 + t], x[1, N + t]])[:, None]
        np.testing.assert_allclose(beside.feed(both)[:, 0], alone.feed(first[:, 6 + t : 7 + t])[:, 1], atol=2e-5)
    stores = (s.state.layer if name == "duoattention" else {"": s.state.layer} for s in (alone, beside))
    for one, other in zip(*(store.values() for store in stores), strict=True):
        assert alone.kept(slots=one)[1] == beside.kept(slots=other)[0]


@pytest.mark.parametrize("name", SMALL)
def test_equal_arguments_make_equal_records(name):
    again = {"duoattention": duoattention(RETRIEVAL.copy(), sink=2, recent=4), "full": full(),
             "streamingllm": streamingllm(2, np.int64(4)), "h2o": h2o(3, 4),
             "h2o mask": h2o_mask(3, 4), "h2o rank": h2o(3, 4, positions="rank"), "tidaldecode": tidaldecode(4, [0, 2]),
             "tidaldecode kv": tidaldecode(4, (0,), per="kv")}[name]  # fmt: skip
    assert again == SMALL[name] and hash(again) == hash(SMALL[name])


def test_streamingllm_keeps_the_first_and_the_last(weights, x):
    s = stream(streamingllm(2, 4), weights)
    text = np.tile(x, (1, 4, 1))
    s.feed(text[:, :N])
    assert s.kept() == [[[0, 1, 5, 6, 7, 8]]] * 2
    for t in range(N, 50):  # ten times as many rows as the cache holds
        s.feed(text[:, t : t + 1])
    for layer in range(LAYERS):
        assert s.kept(layer) == [[[0, 1, 46, 47, 48, 49]]] * 2
    assert s.state.layer.width == 6
    np.testing.assert_array_equal(np.sort(s.state.layer.stats["rank"][0, 0, 0]), np.arange(6))
    s.state = evict_range(s.state, 1, 4)
    assert s.kept() == [[[0, 48, 49]]] * 2
    s.feed(text[:, 50:52])  # a chunk fills the room first
    assert s.kept() == [[[0, 48, 49, 50, 51]]] * 2


def test_streamingllm_reads_places_in_the_cache_not_in_the_text(weights, x):
    near, far = stream(streamingllm(2, 4), weights), stream(streamingllm(2, 4), weights)
    for a, b in ((0, N), (N, N + 1), (N + 1, N + 3)):
        pos = np.arange(a, b)[None].repeat(2, 0)
        np.testing.assert_array_equal(near.feed(x[:, a:b], pos=pos), far.feed(x[:, a:b], pos=pos + 100_000))


def test_h2o_protects_recent_rows_and_evicts_the_smallest_score(weights, x):
    s = stream(h2o(3, 4), weights)
    s.feed(x[:, :N])
    text = np.tile(x, (1, 2, 1))
    for t in range(N, 22):
        before = s.state.layer
        s.feed(text[:, t : t + 1])
        for b in range(2):
            for g in range(KV):
                had, has = set(np.asarray(before.meta.pos[1, b, g]).tolist()), set(s.kept(1)[b][g])
                assert set(range(t - 3, t + 1)) <= has and len(has) == 7
                (gone,) = (had | {t}) - has
                acc = dict(zip(np.asarray(s.state.layer.meta.pos[1, b, g]).tolist(),
                               np.asarray(s.state.layer.stats["acc"][1, b, g]).tolist(), strict=True))  # fmt: skip
                older = [p for p in had & has if p < t - 3]
                slot = np.asarray(before.meta.pos[1, b, g]).tolist().index(gone)
                assert float(before.stats["acc"][1, b, g, slot]) <= min(acc[p] for p in older)


def test_h2o_mass_window_and_pure_top_set(weights, x):
    s = stream(GENEROUS["h2o"], weights)
    s.feed(x[:, :N])
    mass = np.asarray(s.state.layer.stats["acc"]).sum((2, 3))
    np.testing.assert_allclose(mass, HEADS * N, rtol=1e-5)  # one unit per head and query
    window = stream(h2o(0, 5), weights)
    top = stream(h2o(5, 0), weights)
    for s in (window, top):
        s.feed(x[:, :N])
        for t in range(N, T):
            s.feed(x[:, t : t + 1])
    assert window.kept() == [[list(range(T - 5, T))] * KV] * 2
    assert all(len(rows) == 5 for rows in top.kept()[0])


def test_tidaldecode_reuses_the_selection_of_the_layer_before(weights, x):
    """With one text layer after another on the same input: layer 1 attends to layer 0's best tokens alone."""
    s = stream(tidaldecode(4, (0,)), weights)
    s.feed(x[:, :N])
    y = np.asarray(s.feed(x[:, N : N + 1]))
    index, count = (np.asarray(s.state.shared[i]) for i in ("index", "count"))
    own = np.asarray(s.state.shared["own"])[:, 0]
    assert ((count[..., 0] + own) == 4).all()
    plain = stream(full(), weights)
    plain.feed(x[:, :N])
    np.testing.assert_allclose(y[0], plain.feed(x[:, N : N + 1])[0], atol=2e-5)  # the selection layer is dense

    # Layer 1 by hand: every head over its four tokens.
    h = x[:, N : N + 1] + y[0]
    meta = Meta.of(1, pos=np.full((2, 1), N, np.int32))
    q, k, v = (np.einsum("bnc,dc->bnd", h, weights[i][1]).reshape(2, 1, -1, D) for i in "qkv")
    q, k = np.asarray(turn(jnp.asarray(q), meta)), np.asarray(turn(jnp.asarray(k), meta))
    slots = plain.state.layer
    plain_k, plain_v = np.asarray(s.state.layer.k[1]), np.asarray(s.state.layer.v[1])
    assert slots.k.shape == s.state.layer.k.shape
    out = np.zeros((2, HEADS, D), np.float32)
    for b in range(2):
        for head in range(HEADS):
            g, rows = head // (HEADS // KV), index[b, head, 0, : count[b, head, 0]]
            ks, vs = plain_k[b, g, rows], plain_v[b, g, rows]
            if own[b, head]:
                ks, vs = np.concatenate([ks, k[b, :, g]]), np.concatenate([vs, v[b, :, g]])
            p = np.exp(ks @ q[b, 0, head] / D**0.5)
            out[b, head] = p @ vs / p.sum()
    want = np.einsum("bd,cd->bc", out.reshape(2, -1), weights["o"][1])
    np.testing.assert_allclose(y[1][:, 0], want, atol=2e-5)


def test_tidaldecode_does_not_see_what_was_not_chosen(weights, x):
    def last(poison):
        s = stream(tidaldecode(3, (0,)), weights)
        s.feed(x[:, :N])
        if poison is not None:
            layer = s.state.layer
            v = jnp.asarray(np.array(layer.v))
            s.state = s.state.replace(layer=layer.replace(v=v.at[1:, 0, :, poison].set(50.0)))
        return np.asarray(s.feed(x[:, N : N + 1])), s

    y, s = last(None)
    chosen = set(np.asarray(s.state.shared["index"][0, :, 0, :3]).ravel().tolist())
    free = next(i for i in range(N) if i not in chosen)
    taken = int(s.state.shared["index"][0, 0, 0, 0])
    np.testing.assert_array_equal(last(free)[0], y)
    assert abs(last(taken)[0] - y)[1].max() > 1e-2


def lambda_attention(weights, x, retrieval, sink, recent):
    """Layers whose streaming kv heads see ``recent`` rows and themselves, from row N on; by the formula."""
    ys, h = [], x.astype(np.float64)
    i, j = np.arange(T)[:, None], np.arange(T)
    causal = j <= i
    streaming = causal & ((i - j <= recent) | (j < sink) | (i < N))
    for layer in range(LAYERS):
        q, k, v = (np.einsum("bnc,dc->bnd", h, weights[w][layer]).reshape(2, T, -1, D) for w in "qkv")
        q, k = (np.asarray(turn(jnp.asarray(a, jnp.float32), Meta.of(T)), np.float64) for a in (q, k))
        k, v = (np.repeat(a, HEADS // KV, axis=2) for a in (k, v))
        seen = np.where(np.repeat(retrieval[layer], HEADS // KV)[:, None, None], causal, streaming)
        p = np.exp(np.where(seen, np.einsum("bnhd,bmhd->bhnm", q, k) / D**0.5, -np.inf))
        out = np.einsum("bhnm,bmhd->bnhd", p / p.sum(-1, keepdims=True), v).reshape(2, T, -1)
        ys.append(np.einsum("bnd,cd->bnc", out, weights["o"][layer]))
        h = h + ys[-1]
    return np.stack(ys)


def test_duoattention_streams_the_heads_that_do_not_retrieve(weights, x):
    found, s = outputs(SMALL["duoattention"], weights, x, cuts=(0, N, *range(N + 1, T + 1)))
    np.testing.assert_allclose(found, lambda_attention(weights, x, RETRIEVAL, 2, 4), atol=5e-5)
    assert s.state.layer["full"].k.shape == (3, 2, 2, T + 2, D)  # one layer has two retrieval heads
    assert "stream" not in s.state.layer
    one = np.array([[True, False], [False, True], [False, False]])
    found, s = outputs(duoattention(one, sink=2, recent=4), weights, x, cuts=(0, N, *range(N + 1, T + 1)))
    np.testing.assert_allclose(found, lambda_attention(weights, x, one, 2, 4), atol=5e-5)
    assert s.kept(slots=s.state.layer["stream"]) == [[[0, 1, 10, 11, 12, 13]]] * 2
    before = step._cache_size()
    outputs(duoattention(one[:, ::-1], sink=2, recent=3), weights, x, cuts=(0, N, *range(N + 1, T + 1)))
    assert step._cache_size() == before  # other heads, the same numbers


def test_retrieval_heads_are_a_quantile_with_ties_broken():
    gates = np.random.default_rng(0).uniform(size=(4, 8))
    heads = retrieval_heads(gates, 0.75)
    assert heads.sum() == 8 and gates[heads].min() > gates[~heads].max()
    tied = retrieval_heads(np.ones((4, 8)), 0.5)
    assert tied.sum() == 16 and retrieval_heads(np.ones((4, 8)), 0.5, seed=None).all()
    assert retrieval_heads(gates, 0).all() and not retrieval_heads(gates, 1).any()


def test_budgets_of_a_bucket_and_layer_sets_share_programs(weights, x):
    for policies in ([h2o(3, 4), h2o(4, 3)], [streamingllm(2, 4), streamingllm(2, 3)],
                     [tidaldecode(4, (0, 2)), tidaldecode(3, (1,))]):  # fmt: skip
        sizes = []
        for policy in policies:
            s = stream(policy, weights)
            s.feed(x[:, :N])
            s.feed(x[:, N : N + 1])
            sizes.append(step._cache_size())
        assert sizes[0] == sizes[1]


def test_side_rows_labels_and_sizes_travel_with_their_rows(weights, x):
    s = stream(h2o(3, 4), weights)
    side = {"mark": jnp.arange(N, dtype=jnp.float32)[None, :, None].repeat(2, 0)}
    s.feed(x[:, :N], side=side)
    s.feed(x[:, N : N + 1], side={"mark": jnp.full((2, 1, 1), float(N))})
    slots = s.state.layer
    # Heads keep different rows, so a fact that heads share is kept once per head.
    np.testing.assert_array_equal(slots.side["mark"], slots.meta.pos)


@pytest.mark.parametrize("name", ["h2o rank", "tidaldecode kv"])
def test_bfloat16(name, weights, x):
    half = {i: w.astype(jnp.bfloat16) for i, w in weights.items()}
    found, s = outputs(GENEROUS[name], half, jnp.asarray(x, jnp.bfloat16), cuts=(0, N, N + 1))
    exact, _ = outputs(GENEROUS[name], weights, x, cuts=(0, N, N + 1))
    assert s.state.layer.k.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), exact, atol=0.15)


@pytest.mark.parametrize("name", ["h2o", "duoattention"])
def test_a_sharded_batch_stays_sharded(name, weights):
    """A step with the batch over four devices moves nothing between them: written slots are addressed per row."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    s = stream(SMALL[name], weights, 4)

    def on(x, axis):
        where = jax.sharding.PartitionSpec(*[None] * axis, "data") if x.ndim > axis else jax.sharding.PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, where))

    state = jax.tree.map(lambda a: on(a, 1), s.state)
    meta = jax.tree.map(lambda a: on(jnp.broadcast_to(a, (4, 1)), 0), Meta.of(1))
    x = on(jnp.zeros((4, 1, DIM)), 0)
    lowered = step.lower(s.policy, s.params, weights, state, x, meta, {}, kv_heads=KV, phase="decode")
    assert not re.search(r" (all-|collective-|reduce-scatter)", lowered.compile().as_text())


@pytest.mark.parametrize("name", ["full", "h2o", "tidaldecode"])
def test_a_step_does_not_copy_the_cache(name, x):
    """Temporary memory of a compiled decoding step, against the cache it donates."""
    layers, d = 32, 64
    w = random_weights(np.random.default_rng(0), layers, DIM, HEADS, KV, d)
    policy = {"full": full(), "h2o": h2o(512, 512), "tidaldecode": tidaldecode(64)}[name]
    s = Stream(policy, w, heads=HEADS, kv_heads=KV, length=1024, batch=2)
    program, _ = split(policy, s.spec)
    meta = jax.tree.map(lambda a: jnp.broadcast_to(a, (2, 1)), Meta.of(1))
    f = jax.jit(step.__wrapped__, static_argnames=("policy", "kv_heads", "phase"), donate_argnames=("state",))
    one = (program, s.params, w, s.state, jnp.asarray(x[:, :1]), meta, {})
    used = f.lower(*one, kv_heads=KV, phase="decode").compile().memory_analysis().temp_size_in_bytes
    cache = sum(a.nbytes for a in jax.tree.leaves(s.state))
    # The CPU arranges the slots of the layer at work anew, and clears a copy of what is not finite: two layers' worth.
    assert used < 0.05 * cache + 2 * cache / layers + w["q"].nbytes, (used, cache)
