import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxattn import tokens
from jaxattn.core.types import Ctx, Meta, Spec, State, Tokens, init_params, split
from jaxattn.tokens.focusui import init_enhancer

RNG = np.random.default_rng(0)
B, N, T, D = 2, 14, 5, 16


def rows(keep, n):
    """The definition of the markers: what leaves, as (index, is marker)."""
    out, i = [], 0
    while i < n:
        if keep[i]:
            out.append((i, False))
        elif i + 1 == n or keep[i + 1]:
            out.append((i, True))
        i += 1
    return out


@pytest.fixture(scope="module")
def params():
    return init_params(tokens.focusui(), Spec(dim=D))


def inputs():
    x, text = (RNG.normal(size=(B, n, D)).astype(np.float32) for n in (N, T))
    return x, text


def test_scores_by_hand(params):
    x, text = inputs()
    valid, text_valid = np.ones((B, N), bool), np.ones((B, T), bool)
    valid[1, -3:], text_valid[0, -1] = False, False
    score = jax.jit(tokens.patch_scores, static_argnames="over")
    found = score(params, x, text, valid, text_valid)

    def enhancer(p, x):
        q, k, v = np.split(x @ p["qkv"]["kernel"] + p["qkv"]["bias"], 3, -1)
        heads = [slice(i * D // 8, (i + 1) * D // 8) for i in range(8)]
        mixed = [jax.nn.softmax(q[:, h] @ k[:, h].T * (D // 8) ** -0.5, -1) @ v[:, h] for h in heads]
        y = x + np.concatenate(mixed, -1) @ p["out"]["kernel"] + p["out"]["bias"]
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
        y = jax.nn.gelu(y @ p["up"]["kernel"] + p["up"]["bias"], approximate=False) @ p["down"]["kernel"] + p["down"]["bias"]
        y = np.tanh(y)
        return y / np.linalg.norm(y, axis=-1, keepdims=True)

    plain = jax.tree.map(np.asarray, params)
    for b in range(B):
        v, t = enhancer(plain["vision"], x[b][valid[b]]), enhancer(plain["text"], text[b][text_valid[b]])
        np.testing.assert_allclose(found[b][valid[b]], (v @ t.T).mean(-1), atol=1e-5)
    most = score(params, x, text, valid, text_valid, over="max")
    assert (np.asarray(most - found)[valid] >= -1e-6).all()


def test_labels():
    share = tokens.box_share((3, 7, 17, 20), (4, 5), 5)
    pixels = np.zeros((20, 25))
    pixels[7:20, 3:17] = 1
    np.testing.assert_allclose(share, pixels.reshape(4, 5, 5, 5).mean((1, 3)))
    flat = tokens.region_weight(np.zeros((3, 4, 6)))
    np.testing.assert_allclose(flat, 1 / np.log(13))
    blocks = np.zeros((3, 4, 6))
    blocks[0, 1:3] = 5  # a region of two in a background that goes around it
    weight = tokens.region_weight(blocks)
    np.testing.assert_allclose(weight[0, 1:3], 1 / np.log(3))
    np.testing.assert_allclose(weight[2], 1 / np.log(11))
    snake = np.zeros((3, 3, 6))
    snake[0, :2], snake[1, :2] = 5, 5
    snake[0, 0] = 0  # joined to the rest by nothing: a corner
    assert np.isclose(tokens.region_weight(snake)[0, 0], 1.0)
    np.testing.assert_allclose(tokens.fused_label(np.zeros((2, 2)), np.ones((1, 1))), 0)
    np.testing.assert_allclose(tokens.fused_label(np.ones((2, 4)), np.ones((1, 2))), 1)


def test_loss_is_the_divergence():
    s, label = RNG.normal(size=(2, B, N)).astype(np.float32)
    p, q = (np.asarray(jax.nn.softmax(x, -1)) for x in (label, s))
    np.testing.assert_allclose(tokens.scorer_loss(s, label), (p * np.log(p / q)).sum(-1).mean(), rtol=1e-5)
    assert abs(tokens.scorer_loss(label, label)) < 1e-6


def test_choice_and_ties():
    scores = RNG.normal(size=(B, N)).astype(np.float32)
    keep = np.asarray(tokens.focusui_keep(scores, 0.6))
    np.testing.assert_array_equal(keep.sum(-1), int(N * 0.4))
    np.testing.assert_array_equal(keep, tokens.focusui_keep(scores, 0.6, seed=np.uint32(3)))  # no ties: no luck
    ids = RNG.integers(0, 150000, (B, 9))
    seed = tokens.tie_seed(ids)
    want = [(sum(int(i) for i in row) * 1315423911) % (2**31 - 1) for row in ids]
    np.testing.assert_array_equal(seed, np.array(want, np.uint32))
    even = np.zeros((B, N), np.float32)
    a, b = (np.asarray(tokens.focusui_keep(even, 0.5, seed=s)) for s in (seed, seed))
    np.testing.assert_array_equal(a, b)
    assert (a.sum(-1) == 7).all() and (a[0] != a[1]).any() and not (a == (np.arange(N) < 7)).all()


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.8, 1.0])
def test_one_marker_for_a_run(params, ratio):
    x, text = inputs()
    valid = np.ones((B, N), bool)
    valid[1, 4] = False  # a row that is not there does not split a run
    tok = Tokens(jnp.asarray(x), Meta.of(N, pos=np.broadcast_to(10 + np.arange(N), (B, N)), valid=valid))
    capacity = tokens.focusui_rows(N, ratio)
    record = tokens.focusui(ratio, capacity)
    values = params | split(record)[1]
    out, _, aux = record.apply(values, State(), tok, {"text": (text, np.ones((B, T), bool))}, Ctx())
    assert out.x.shape[1] == capacity == record.rows(N)
    for b in range(B):
        there = np.flatnonzero(valid[b])
        want = rows(np.asarray(aux["kept"])[b][there], len(there))
        live = np.asarray(out.meta.valid)[b]
        np.testing.assert_array_equal(np.asarray(out.meta.pos)[b][live], 10 + there[[i for i, _ in want]])
        for row, (i, marker) in zip(np.asarray(out.x)[b][live], want, strict=True):
            np.testing.assert_array_equal(row, params["marker"] if marker else x[b, there[i]])
        slot = np.asarray(out.slot)[b]
        np.testing.assert_array_equal(slot[there], np.searchsorted([i for i, _ in want], np.arange(len(there))))
        assert (slot[~valid[b]] == -1).all()
    if ratio == 0:
        np.testing.assert_array_equal(out.x[0], x[0])
    if ratio == 1:  # everything dropped: one marker, at the last place
        assert np.asarray(out.meta.valid)[0].sum() == 1 and np.asarray(out.meta.pos)[0, 0] == 10 + N - 1


def test_the_scorer_learns():
    """Image tokens that resemble the instruction are to be found: KL falls and the choice gets right."""
    word = RNG.normal(size=(64, 1, D)).astype(np.float32)
    target = RNG.integers(0, 8, 64)
    x = RNG.normal(size=(64, 8, D)).astype(np.float32) * 0.5
    x[np.arange(64), target] += word[:, 0]
    label = np.where(np.arange(8) == target[:, None], 4.0, -1.0).astype(np.float32)
    a, b = jax.random.split(jax.random.key(0))
    params = {"vision": init_enhancer(a, D), "text": init_enhancer(b, D), "scale": jnp.float32(5)}
    optimizer = optax.adam(3e-3)
    valid, text_valid = np.ones((64, 8), bool), np.ones((64, 1), bool)

    def loss(params):
        s = tokens.patch_scores(params, x, word, valid, text_valid) * params["scale"]
        return tokens.scorer_loss(s, label), (s.argmax(-1) == target).mean()

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            found, gradient = jax.value_and_grad(loss, has_aux=True)(params)
            update, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, update), state), found

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=60)[1]

    losses, right = (np.asarray(v) for v in train(params))
    assert losses[-1] < 0.3 * losses[0] and right[-1] > 0.9 > 0.5 > right[0]


def test_pointer():
    params = {"enhancer": init_enhancer(jax.random.key(0), D)}
    params |= {side: {"kernel": jnp.eye(D), "bias": jnp.zeros(D)} for side in ("vision", "target")}
    x, _ = inputs()
    valid = np.ones((B, N), bool)
    valid[0, 7:] = False
    logits = tokens.pointer_logits(params, x, x[:, 2], valid)
    probability = np.asarray(jax.nn.softmax(logits, -1))
    assert (probability[0, 7:] == 0).all() and np.allclose(probability.sum(-1), 1)
    target = np.asarray(tokens.pointer_target(np.arange(N)[None] < 4, np.arange(N)[None] % 2 == 0))
    np.testing.assert_allclose(target[0, :4], [0.5, 0, 0.5, 0])
    assert tokens.pointer_target(np.zeros((1, N), bool), valid[:1]).sum() == 0
