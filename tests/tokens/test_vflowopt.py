import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import tokens
from jaxattn.core.types import Ctx, Meta, State, Tokens, split
from jaxattn.tokens.vflowopt import cells_of, global_rows, search_bounds

RNG = np.random.default_rng(0)
B, C = 2, 5
MAPS = ((6, 6), (4, 8))
N = 36 + 32
X = RNG.normal(size=(B, N, C)).astype(np.float32)
S = RNG.exponential(size=(B, N)).astype(np.float32)
recycle = jax.jit(tokens.recycle, static_argnums=(2, 3, 4))


def test_importance():
    a = RNG.dirichlet(np.full(20, 0.3), size=(B, 20)).astype(np.float32)
    g = a.mean(1)
    for t in (0.0, 1.5):
        for b in range(B):
            chosen = a[b][g[b] > t * g[b].mean()]
            np.testing.assert_allclose(tokens.vflowopt_importance(a, t)[b], chosen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(tokens.vflowopt_importance(a, 0.0), g, rtol=1e-5)  # t = 0: all rows, s = g
    assert np.asarray(global_rows(g, 1e9)).all()  # no row qualifies: all of them
    e = RNG.normal(size=(B, 20)).astype(np.float32)
    want = g + 0.5 * np.exp(e) / np.exp(e).sum(-1, keepdims=True)
    np.testing.assert_allclose(tokens.vflowopt_importance(a, 0.0, entropy=e, alpha=0.5), want, rtol=1e-5)


def test_patch_entropy():
    image = np.zeros((1, 4, 8, 3), np.float32)
    image[0, :, 4:] = np.linspace(0, 1, 16).reshape(4, 4, 1)  # 16 different greys
    image[0, :2, :4] = 1.0
    np.testing.assert_allclose(tokens.patch_entropy(image, 4), [[1.0, 4.0]], rtol=1e-5)


@pytest.mark.parametrize("cell", [2.0, 3.5, 100.0])
def test_recycling_by_hand(cell):
    rows, slot, index, valid = recycle(X, S, 0.4, cell, MAPS)
    low_count = min(N, round(N * 0.6) + int(N / cell**2))
    at = [(m, r, c) for m, (h, w) in enumerate(MAPS) for r in range(h) for c in range(w)]
    for b in range(B):
        order = np.argsort(S[b], kind="stable")
        groups = {}
        for j in order[:low_count]:
            m, r, c = at[j]
            groups.setdefault((m, int(r // cell), int(c // cell)), []).append(j)
        want = {int(j): X[b, j] for j in order[low_count:]}
        for g in groups.values():
            leader = max(g, key=lambda j: S[b, j])
            want[int(leader)] = (S[b, g, None] * X[b, g]).sum(0) / S[b, g].sum()
        live = np.asarray(valid)[b]
        np.testing.assert_array_equal(np.asarray(index)[b][live], sorted(want))
        np.testing.assert_allclose(np.asarray(rows)[b][live], [want[j] for j in sorted(want)], rtol=1e-4, atol=1e-5)
        if cell == 100.0:
            assert len(groups) == 2  # one per map
        assert (np.asarray(slot)[b] >= 0).all()


def test_one_program_serves_all_settings():
    """Every row in its place: the same rows and values as gathered ones, of settings that may be traced."""
    records = [tokens.vflowopt(r, c, 3.0, maps=MAPS, alpha=a, mode="mask") for r, c, a in ((0.4, 2.0, 0.0), (0.7, 3.5, 0.5))]
    programs = [split(record) for record in records]
    assert programs[0][0] == programs[1][0] and programs[0][0].facts(programs[0][1]) == {"vflowopt.threshold": 3.0}
    image = np.zeros((B, 4, 4 * N, 1), np.float32)  # plain patches: the entropy moves all alike
    for (program, params), (ratio, cell) in zip(programs, ((0.4, 2.0), (0.7, 3.5)), strict=True):
        out = program.apply(params, State(), Tokens(X, Meta.of(N)), {"importance": S, "image": image}, Ctx())[0]
        rows, slot, index, valid = (np.asarray(a) for a in recycle(X, S + params["alpha"] / N, ratio, cell, MAPS))
        for b in range(B):
            live = np.asarray(out.meta.valid)[b]
            np.testing.assert_array_equal(np.flatnonzero(live), index[b][valid[b]])
            np.testing.assert_allclose(np.asarray(out.x)[b][live], rows[b][valid[b]], atol=1e-5)
            np.testing.assert_array_equal(np.asarray(out.slot)[b], index[b][slot[b]])


def test_equal_tokens_stay_equal_and_cells_count():
    rows, _, _, valid = recycle(np.ones_like(X), S, 0.4, 2.0, MAPS)
    np.testing.assert_allclose(np.asarray(rows)[np.asarray(valid)], 1, rtol=1e-5)
    group, count = cells_of(MAPS, 3.5)
    assert count == 2 * 2 + 1 * 3 == len(set(group.tolist()))


def test_records_and_the_last_ratio():
    record = tokens.vflowopt(ratio=0.4, cell=2.0, maps=MAPS)
    program, params = split(record)
    out = program.apply(params, State(), Tokens(X, Meta.of(N)), {"importance": S}, Ctx())[0]
    rows, slot, index, valid = recycle(X, S, 0.4, 2.0, MAPS)
    assert out.x.shape[1] == record.rows(N)
    np.testing.assert_allclose(out.x, rows, atol=1e-6)
    np.testing.assert_array_equal(out.slot, slot)
    plain = tokens.vflowopt(ratio=0.5, recycles=False)
    kept = plain.apply({}, State(), Tokens(X, Meta.of(N)), {"importance": S}, Ctx())[0]
    np.testing.assert_array_equal(kept.meta.pos, np.sort(np.argsort(-S, -1)[:, : N // 2], -1))
    (need,) = record.needs()
    assert need.merged == "max" and need.rows.given.at == need.at

    # the published quarter: its ratios meet the budget
    r0, r1 = 0.2651, 0.983
    r2 = tokens.last_ratio(0.25, r0, r1)
    np.testing.assert_allclose((9 * r0 + 9 * r0 * r1 + 10 * r0 * r1 * r2) / 28, 0.25, rtol=1e-6)
    np.testing.assert_allclose(r2, 0.877, atol=1e-2)
    cuts = tokens.vflowopt_stages((0.5, 0.25)).schedule(28)
    assert [s for s, _ in cuts] == [9, 18] and cuts[0][1].rows(40) == 20
    tok = Tokens(X, Meta.of(N, valid=jnp.arange(N)[None] < jnp.array([[N], [20]])))
    left = cuts[0][1].apply({}, State(), tok, {"importance": S}, Ctx())[0]
    assert np.asarray(left.meta.valid).sum(-1).tolist() == [N // 2, 10]


def test_search_finds_a_peak_and_makes_records():
    """A stand-in for the calibration run whose best settings are known."""
    peak = {"ratio": 0.3, "second": 0.8, "threshold": 20.0, "cell": 10.0, "alpha": 0.0}
    bounds = search_bounds(0.25)

    def agreement(settings):
        gap = sum(((settings[k] - peak[k]) / (hi - lo)) ** 2 for k, (lo, hi) in bounds.items())
        return float("nan") if settings["threshold"] > 45 else 10 - gap  # some settings break the model

    found = tokens.vflowopt_search(agreement, 0.25, calls=40, initial=15)
    settings, value = found.best
    at_random = max(v for v in found.values[:15] if v == v)
    assert value > 10 - 0.06 and value > at_random and len(found.values) == 40
    assert tokens.vflowopt_search(agreement, 0.25, calls=16, initial=15).tried == found.tried[:16]
    reduce = tokens.vflowopt_reduce(settings, 0.25)
    assert set(reduce) == {"vision", "llm"}
    r0, (r1, r2) = settings["ratio"], reduce["llm"].ratios
    np.testing.assert_allclose((9 * r0 + 9 * r0 * r1 + 10 * r0 * r1 * r2) / 28, 0.25, rtol=1e-5)


def test_agreement():
    h = RNG.normal(size=(3, 8)).astype(np.float32)
    np.testing.assert_allclose(tokens.last_token_agreement(2 * h, h), 3, rtol=1e-6)
    broken = h.copy()
    broken[1] = np.nan
    np.testing.assert_allclose(tokens.last_token_agreement(broken, h), 2, rtol=1e-6)
