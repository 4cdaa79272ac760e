"""Focus-DETR: the selector and the encoder against their formulas; what is not focused stays as it was, to the bit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from models.detection import boxes
from models.detection import focus_detr as fd
from pallas_kernels import _dispatch

CONFIG = fd.FocusDETRConfig((16, 16), 3, ((0, 6), (4, 64)), channels=1, stride=4, dim=8, heads=2, points=2, hidden=12, rho=0.5,
                            cascade=(1.0, 0.5), fine=3, decoder_layers=1, queries=4)  # fmt: skip
RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(2, 16, 16, 1)).astype(np.float32)
SIZE = np.array([[16, 16], [10, 16]], np.int32)
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # programs that run once


def quick(f, *args):
    return jax.jit(f).lower(*args).compile(compiler_options=FAST)(*args)


@pytest.fixture(scope="module", autouse=True)
def plain_attention():
    """The formula's own body: it compiles in a third of the time."""
    with _dispatch.unnamed("reference"):
        yield


@functools.cache
def params():
    rng = np.random.default_rng(1)  # not at their first values, where all points are weighed alike
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.4, s.dtype), shapes(CONFIG))


def shapes(c):
    return jax.eval_shape(lambda: fd.init(c, 0))


@pytest.fixture(scope="module")
def found():
    """Of the batch, and of the batch turned round."""
    program = jax.jit(functools.partial(fd.forward, CONFIG)).lower(params(), IMAGE, size=SIZE).compile(compiler_options=FAST)
    return program(params(), IMAGE, size=SIZE), program(params(), IMAGE[::-1].copy(), size=SIZE[::-1].copy())


def test_scores_go_top_down(found):
    """Numpy: memory, halves of own and shared channels, coarse scores lifting fine rows by alpha; padding at the minimum."""
    found = found[0]
    p = jax.tree.map(np.asarray, params())
    norm = lambda n, x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * n["scale"] + n["bias"]  # noqa: E731
    dense = lambda d, x: x @ d["kernel"] + d["bias"]  # noqa: E731
    gelu = lambda x: x * 0.5 * (1 + erf(x / 2**0.5))  # noqa: E731
    x, place = (np.asarray(a) for a in fd.features(CONFIG, params(), IMAGE))
    valid = np.asarray(fd.cells_valid(CONFIG, SIZE, 2))
    m = np.where(valid[..., None], norm(p["enter_norm"], dense(p["enter"], np.where(valid[..., None], x, 0) + place)), 0)

    def score(rows):
        z = gelu(dense(p["score_in"], norm(p["score_norm"], rows)))
        z = np.concatenate([z[:, :4], np.broadcast_to(z[:, 4:].mean(0), z[:, 4:].shape)], 1)
        return dense(p["score"]["dense2"], gelu(dense(p["score"]["dense1"], gelu(dense(p["score"]["dense0"], z)))))[:, 0]

    for b in range(2):
        coarse = score(m[b, 16:])
        up = np.zeros((4, 4))
        for i in range(4):
            for j in range(4):
                y, s = i / 3, j / 3  # corners on corners of a 2 x 2 map
                grid = coarse.reshape(2, 2)
                up[i, j] = (grid[0, 0] * (1 - y) + grid[1, 0] * y) * (1 - s) + (grid[0, 1] * (1 - y) + grid[1, 1] * y) * s
        fine = score(m[b, :16] * (1 + p["alpha"][0] * up.reshape(-1, 1)))
        expected = np.concatenate([fine, coarse])
        expected = np.where(valid[b], expected, expected[valid[b]].min())
        np.testing.assert_allclose(found.scores[b], expected, rtol=1e-4, atol=1e-5)
    assert not valid[1].all() and (found.scores[1][~valid[1]] == found.scores[1].min()).all()
    assert p["alpha"].shape == (1,)


def test_cascade_counts_and_what_is_not_focused(found):
    (found, turned), valid = found, np.asarray(fd.cells_valid(CONFIG, SIZE, 2))
    np.testing.assert_array_equal(found.count, (valid.sum(1) * 0.5).astype(int) + 1)
    x = np.where(valid[..., None], fd.features(CONFIG, params(), IMAGE)[0], 0)
    updated = [[set(np.asarray(i)[b][np.asarray(i)[b] >= 0].tolist()) for i, _ in found.seen] for b in range(2)]
    for b in range(2):
        most = int(found.count.max())
        assert [len(s) for s in updated[b]] == [min(int(found.count[b]), most), min(int(found.count[b]), most // 2)]
        assert updated[b][1] <= updated[b][0] and all(valid[b][list(updated[b][0])])
        ranked = np.where(valid[b], found.scores[b], -np.inf).argsort(kind="stable")[::-1]
        assert updated[b][1] == set(ranked[: len(updated[b][1])].tolist())
        changed = np.abs(np.asarray(found.memory[b]) - x[b]).max(-1)  # another program: the same to rounding
        assert set(np.flatnonzero(changed > 1e-4).tolist()) == updated[b][0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[::-1], b, atol=1e-5), turned, found)


def test_everything_focused_updates_everything():
    c = dataclasses.replace(CONFIG, rho=1.0, cascade=(1.0,), decoder_layers=0)
    out = quick(lambda p, image: fd.forward(c, p, image), params(), IMAGE)
    x = np.asarray(fd.features(CONFIG, params(), IMAGE)[0])
    assert (np.asarray(out.memory) != x).any(-1).all() and out.seen[0][0].shape == (2, 20)


def test_dual_attention_changes_the_fine_tokens_alone():
    p = params()["encoder0"]
    x, place = jnp.asarray(RNG.normal(size=(2, 7, 8)), jnp.float32), jnp.asarray(RNG.normal(size=(2, 7, 8)), jnp.float32)
    score, live = jnp.asarray(RNG.random((2, 7)), jnp.float32), jnp.array([[True] * 7, [True] * 2 + [False] * 5])
    y, logits = fd.dual_attention(CONFIG, p, x, place, score, live)
    rank = np.where(live, np.asarray(logits).max(-1) * np.asarray(score), -np.inf)
    for b, n in enumerate((3, 2)):
        chosen = set(np.argsort(-rank[b])[:n].tolist())
        assert set(np.flatnonzero((np.asarray(y[b]) != x[b]).any(-1)).tolist()) == chosen
    among = np.sort(np.argsort(-rank[0])[:3])
    expected = fd.self_attend(p["self"], 2, x[:1, among], place[:1, among])
    np.testing.assert_allclose(y[0, among], expected[0], atol=1e-5)


def test_a_layer_reads_the_given_values():
    """Post-norm, values that no layer updates, offsets in cells around the cell's own place."""
    from jaxattn.core.deformable import deformable_read

    c, p = dataclasses.replace(CONFIG, fine=1), params()["encoder0"]
    out = jnp.asarray(RNG.normal(size=(1, 20, 8)), jnp.float32)
    values, place = jnp.asarray(RNG.normal(size=(1, 20, 8)), jnp.float32), jnp.asarray(RNG.normal(size=(20, 8)), jnp.float32)
    index, live = jnp.array([[18, 5]]), jnp.array([[True, True]])
    new, _ = fd.encoder_layer(c, p, out, values, place, jnp.ones((1, 20)), index, live)
    others = np.setdiff1d(np.arange(20), index)
    np.testing.assert_array_equal(new[:, others], out[:, others])  # to the bit
    x, at = out[:, index[0]], jnp.asarray(boxes.centres(c.shapes, c.strides) / 16)[index]
    x, _ = fd.dual_attention(c, p, x, place[index], jnp.ones((1, 2)), live)
    dense = lambda n, x: x @ p["cross"][n]["kernel"] + p["cross"][n]["bias"]  # noqa: E731
    offset = dense("offset", x + place[index]).reshape(1, 2, 2, 2, 2, 2)
    weight = jax.nn.softmax(dense("weight", x + place[index]).reshape(1, 2, 2, 4), -1).reshape(1, 2, 2, 2, 2)
    points = at[:, :, None, None, None] + offset / jnp.array([4.0, 2.0])[:, None, None]
    read = dense("out", deformable_read(dense("value", values).reshape(1, 20, 2, 4), c.shapes, points, weight).reshape(1, 2, 8))
    norm = lambda n, x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * n["scale"] + n["bias"]  # noqa: E731
    x = norm(p["norm1"], x + read)
    mlp = jax.nn.relu(x @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"]) @ p["mlp"]["down"]["kernel"]
    np.testing.assert_allclose(new[:, index[0]], norm(p["norm2"], x + mlp + p["mlp"]["down"]["bias"]), atol=2e-5)


def test_a_step_of_training():
    box = jnp.array([[[1.0, 1, 9, 9], [0, 0, 0, 0]], [[2, 2, 15, 9], [4, 1, 8, 5]]])
    classes = jnp.array([[2, -1], [0, 1]])

    c = dataclasses.replace(CONFIG, cascade=(0.6,))
    f = lambda p: fd.loss(c, fd.forward(c, p, IMAGE), box, classes)  # noqa: E731
    mine = {name: params()[name] for name in shapes(c)}
    (value, parts), grads = quick(jax.value_and_grad(f, has_aux=True), mine)
    assert np.isfinite(value) and set(parts) == {"selector", "proposals", "detection"}
    used = {name: float(sum(jnp.abs(g).sum() for g in jax.tree.leaves(tree))) for name, tree in grads.items()}
    assert all(np.isfinite(x) and x > 0 for x in used.values()), used


def test_what_is_refused():
    for field, value in (("image", (18, 16)), ("rho", 0.0), ("cascade", (1.2,)), ("queries", 30)):
        with pytest.raises(ValueError, match=f"{field}: expected"):
            dataclasses.replace(CONFIG, **{field: value})
