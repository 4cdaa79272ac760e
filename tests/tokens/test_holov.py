import jax
import numpy as np

from jaxattn import tokens
from jaxattn.core.types import Ctx, Meta, State, Tokens, split

RNG = np.random.default_rng(0)
quotas = jax.jit(tokens.holov_quotas, static_argnames="crops")


def test_golden(golden):
    g = golden("holov")
    with jax.enable_x64(True):
        for x, s, crops, keep, out in (("x", "score", "num_patches", "keep", "out"),
                                       ("x2", "score2", "num_patches2", "keep2", "out2")):  # fmt: skip
            found = tokens.holov_tokens(g[x], g[s], int(g[keep]), int(g[crops]))
            np.testing.assert_allclose(found, g[out], rtol=0, atol=1e-10)


def test_record_keeps_the_golden_rows(golden):
    """In raster order, with rows of padding behind that neither count nor matter."""
    g = golden("holov")
    n, keep = g["x"].shape[1], int(g["keep"])
    index, valid = tokens.holov_select(g["x"], g["score"], keep, int(g["num_patches"]))
    program, params = split(tokens.holov(keep=keep, crops=int(g["num_patches"])))
    tok = Tokens(g["x"].astype(np.float32), Meta.of(n))
    out = program.apply(params, State(), tok, {"cls": g["score"].astype(np.float32)}, Ctx())[0]
    for b in range(2):
        rows = np.broadcast_to(out.meta.pos, out.meta.valid.shape)[b][np.asarray(out.meta.valid)[b]]
        np.testing.assert_array_equal(rows, np.sort(np.asarray(index)[b][np.asarray(valid)[b]]))


def test_quotas():
    n, crops = 30, 5
    same = np.ones((1, n, 4), np.float32)
    np.testing.assert_array_equal(quotas(same, np.full((1, n), 0.1, np.float32), 10, crops=crops), np.full((1, crops), 2))
    x, s = RNG.normal(size=(3, n, 4)).astype(np.float32), RNG.exponential(size=(3, n)).astype(np.float32)
    for keep in (7, 10, 30):
        assert (np.asarray(quotas(x, s, keep, crops=crops)).sum(-1) == keep).all()
    # all attention in one crop, nothing to tell apart elsewhere: it takes min(K, its size)
    s = np.zeros((1, n), np.float32)
    s[0, 6:12] = 1
    index, valid = tokens.holov_select(same, s, 10, crops)
    assert int(quotas(same, s, 10, crops=crops)[0, 1]) >= 9
    assert set(range(6, 12)) <= set(np.asarray(index)[0][np.asarray(valid)[0]].tolist()) and int(valid.sum()) < 10


def test_one_crop_is_fastervlm():
    x, s = RNG.normal(size=(2, 24, 4)).astype(np.float32), RNG.exponential(size=(2, 24)).astype(np.float32)
    tok = Tokens(x, Meta.of(24))
    a, b = (program.apply(params, State(), tok, {"cls": s}, Ctx())[0]
            for program, params in (split(tokens.holov(8, crops=1)), split(tokens.fastervlm(8))))  # fmt: skip
    np.testing.assert_array_equal(a.slot, b.slot)
    assert tokens.holov_crops(576, 64) == 16 and tokens.holov_crops(100, 90) == 1
