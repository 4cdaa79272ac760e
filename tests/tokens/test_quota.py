import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import tokens
from jaxattn.core.labels import KIND_NEWLINE
from jaxattn.core.pooling import adaptive_avg_pool_2d, bilinear_resize
from jaxattn.core.types import Ctx, Meta, State, Tokens, split

RNG = np.random.default_rng(0)


def test_shares():
    p = np.array([0.2, 0.4, 0.1, 0.1])
    w = np.asarray(tokens.quota_shares(p))
    np.testing.assert_allclose(w, p**2 / (p**2).sum(), rtol=1e-6)
    assert abs(w[1] / w[0] - 4) < 1e-5  # twice the probability, four times the tokens
    np.testing.assert_array_equal(tokens.quota_counts(np.full(7, 0.3), 100), 100 // 7)
    assert tokens.quota_counts(RNG.uniform(size=50), 12544).sum() <= 12544
    np.testing.assert_array_equal(tokens.quota_counts(np.array([0.9, 0.001]), 100), [99, 0])
    capped = np.asarray(tokens.quota_counts(np.array([0.9, 0.3, 0.3, 0.15]), 100, most=40))
    # 40 for the first; the other 60 in proportion 4 : 4 : 1, all below 40
    np.testing.assert_array_equal(capped, [40, 26, 26, 6])
    np.testing.assert_array_equal(tokens.quota_counts(np.array([0.9, 0.8, 0.1]), 100, most=40), [40, 40, 20])
    assert tokens.quota_frames(3600) == 160 and tokens.quota_frames(100) == 97


def test_grids():
    count = np.arange(0, 400)
    h, w = (np.asarray(x) for x in tokens.quota_grid(count))
    for c, a, b in zip(count, h, w, strict=True):
        side = int(np.floor(np.sqrt(c)))
        assert (a, b) == ((side + 1, side) if side * side < c and (side + 1) * side <= c else (side, side))


@pytest.mark.parametrize("resize", tokens.QUOTA_RESIZES)
def test_resizing_is_that_of_each_frame(resize):
    """Frames of any size in one static array: as each map resized alone."""
    x, counts = RNG.normal(size=(4, 9, 9, 5)).astype(np.float32), np.array([20, 0, 81, 7])
    if resize == "bilinear":
        counts[3] = 130  # up
    rows, place = jax.jit(lambda x, c: tokens.quota_resize(x, c, 260, resize=resize))(x, counts)
    start = 0
    for f, c in enumerate(counts):
        h, w = (int(v) for v in tokens.quota_grid(c))
        if c == 0:
            continue
        if resize == "linspace":
            pick = lambda m: np.linspace(0, 8, m).astype(int) if m > 1 else np.array([0])  # noqa: E731
            want = x[f][pick(h)][:, pick(w)]
        else:
            want = {"bilinear": bilinear_resize, "average": adaptive_avg_pool_2d}[resize](x[f], (h, w))
        np.testing.assert_allclose(rows[start : start + h * w], want.reshape(h * w, 5), atol=2e-5)
        np.testing.assert_array_equal(place["frame"][start : start + h * w], f)
        start += h * w
    assert place["valid"].sum() == start and (np.asarray(rows[start:]) == 0).all()
    np.testing.assert_allclose(rows[np.asarray(place["frame"]) == 2][:81], x[2].reshape(81, 5), atol=2e-5)  # its own size


def test_newlines_end_each_line():
    x, line = RNG.normal(size=(2, 4, 4, 3)).astype(np.float32), np.full(3, 7.0, np.float32)
    rows, place = tokens.quota_resize(x, np.array([6, 4]), 16, newline=line)
    ends = np.asarray(place["newline"])
    np.testing.assert_array_equal(np.flatnonzero(ends), [2, 5, 8, 11, 14])  # grids of 3 x 2 and 2 x 2
    assert (np.asarray(rows)[ends] == 7).all() and not (np.asarray(rows)[~ends] == 7).any()
    without, _ = tokens.quota_resize(x, np.array([6, 4]), 10)
    np.testing.assert_allclose(np.asarray(rows)[~ends][:10], without)


def test_merging():
    merge = jax.jit(tokens.quota_merge, static_argnums=1, static_argnames="lines")
    x = jnp.asarray(RNG.normal(size=(16, 6)).astype(np.float32))
    np.testing.assert_array_equal(merge(x, 16), x)
    np.testing.assert_allclose(merge(x, 1)[0], x.mean(0), atol=1e-5)  # sizes weigh: the mean of all
    pairs = jnp.repeat(x[:8], 2, 0)  # each row twice, side by side: merging half of them loses nothing
    np.testing.assert_allclose(np.sort(merge(pairs, 8), 0), np.sort(x[:8], 0), atol=1e-6)
    assert merge(x, 5, lines=(4, 4)).shape == (4, 6)


def test_decoupling():
    said = []

    def ask(answers):
        answers = iter(answers)
        return lambda prompt: said.append(prompt) or next(answers)

    found = tokens.decouple("Who holds the red cup?", ask(["Yes.", "person, red cup, intent", "person, red cup"]))
    assert "any object of person, red cup?" in found and len(said) == 3
    assert "sufficient information" in tokens.decouple("Why?", ask(["No"]))
    assert "sufficient information" in tokens.decouple("Why?", ask(["yes", "love", "none"]))
    logits = np.log(np.array([[0.1, 0.7, 0.2], [0.5, 0.25, 0.25]]))
    np.testing.assert_allclose(tokens.quota_scores(jnp.asarray(logits), 1), [0.7, 0.25], rtol=1e-5)


def test_record():
    x = RNG.normal(size=(2, 3 * 16, 5)).astype(np.float32)
    tok = Tokens(x, Meta.of(48))
    scores = np.array([[0.5, 0.5, 0.5], [0.8, 0.1, 0.1]])
    program, params = split(tokens.quota(24, scores, (4, 4)))
    assert program == split(tokens.quota(24, scores[:, ::-1], (4, 4)))[0]
    out, _, aux = program.apply(params, State(), tok, {}, Ctx())
    assert out.x.shape == (2, 24, 5) == (2, program.rows(48), 5)
    np.testing.assert_array_equal(aux["counts"], [[8, 8, 8], [23, 0, 0]])
    np.testing.assert_array_equal(np.asarray(out.meta.valid).sum(-1), [3 * 6, 20])
    want = bilinear_resize(x[0].reshape(3, 4, 4, 5), (3, 2)).reshape(18, 5)
    np.testing.assert_allclose(out.x[0, :18], want, atol=1e-5)
    pos = np.asarray(out.meta.pos)[0, :18]
    assert (np.diff(pos) > 0).all() and pos[6] == 16
    program, params = split(tokens.quota(24, scores, (4, 4), newline=np.ones(5)))
    lines, _, _ = program.apply(params, State(), tok, {}, Ctx())
    kinds = np.asarray(lines.meta.labels["kind"])
    assert (kinds[0] == KIND_NEWLINE).sum() == 9 and lines.x.shape[1] > 24
    with pytest.raises(ValueError, match="grid: expected a grid that divides the 48 rows"):
        tokens.quota(24, scores, (5, 5)).apply(params, State(), tok, {}, Ctx())
