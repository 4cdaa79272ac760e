"""Masks against their formulas, element by element; interval bounds against brute force on random Metas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core import mask as masks
from jaxattn.core.types import Meta

FORMULAS = [
    (masks.causal(), lambda q, k: k["pos"] <= q["pos"]),
    (masks.causal("seg"), lambda q, k: k["seg"] <= q["seg"]),
    (masks.window(5), lambda q, k: q["pos"] - k["pos"] < 5),
    (masks.window(4, 3), lambda q, k: (q["pos"] - k["pos"] < 4) & (k["pos"] - q["pos"] < 3)),
    (masks.window(None, 2, "seg"), lambda q, k: k["seg"] - q["seg"] < 2),
    (masks.first(6), lambda q, k: (k["pos"] < 6) & (q["pos"] == q["pos"])),
    (masks.prefix(4), lambda q, k: (k["pos"] <= q["pos"]) | (k["pos"] < 4)),
    (masks.same("seg"), lambda q, k: q["seg"] == k["seg"]),
    (masks.query_is("kind", 1), lambda q, k: (q["kind"] == 1) & (k["kind"] == k["kind"])),
    (masks.key_is("kind", 2), lambda q, k: (k["kind"] == 2) & (q["kind"] == q["kind"])),
    (masks.mutual(), lambda q, k: (k["pos"] <= q["pos"]) | ((q["kind"] == 1) & (k["kind"] != 1))),
    (
        masks.causal() & (masks.window(7) | masks.first(3)) & ~masks.same("kind"),
        lambda q, k: (k["pos"] <= q["pos"]) & ((q["pos"] - k["pos"] < 7) | (k["pos"] < 3)) & (q["kind"] != k["kind"]),
    ),
]


def random_meta(rng, n, *, heads=None, sort=False):
    shape = (2, n) if heads is None else (2, heads, n)
    pos = rng.integers(-5, 30, shape).astype(np.int32)
    pos = np.sort(pos, -1) if sort else pos
    small = lambda top: rng.integers(0, top, shape).astype(np.int32)  # noqa: E731
    seg = np.sort(small(4), -1) if sort else small(4)
    return Meta.of(n, pos=pos, valid=rng.random((2, n)) < 0.7, seg=seg, kind=small(3))


def cells(meta, side):
    """The fields spelled out as [B, G|1, N, 1] or [B, G|1, 1, M], apart from the code under test."""
    fields = {"pos": meta.pos, **meta.labels, "valid": meta.valid}
    fields = {k: np.asarray(x) if x.ndim == 3 else np.asarray(x)[:, None] for k, x in fields.items()}
    return {k: x[..., :, None] if side == "q" else x[..., None, :] for k, x in fields.items()}


@pytest.mark.parametrize("which", range(len(FORMULAS)))
def test_elements_follow_the_formula(rng, which):
    mask, formula = FORMULAS[which]
    q, k = random_meta(rng, 9), random_meta(rng, 13, heads=2)
    want = np.broadcast_to(formula(cells(q, "q"), cells(k, "k")), (2, 2, 9, 13))
    got = mask(q, k)
    assert isinstance(got, np.ndarray)
    np.testing.assert_array_equal(np.broadcast_to(got, want.shape), want)
    np.testing.assert_array_equal(np.broadcast_to(mask(jax.tree.map(jnp.asarray, q), k), want.shape), want)


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("which", range(len(FORMULAS)))
def test_bounds_are_sound(rng, which, sort):
    """may is never False where a valid pair is visible; surely is never True where a valid pair is hidden."""
    mask, formula = FORMULAS[which]
    tile, unit = 4, 3
    for trial in range(12):
        q = random_meta(rng, 18, sort=sort)
        k = random_meta(rng, 20, heads=2 if trial % 2 else None, sort=sort)
        q.valid[:, 4:8] = False  # a whole tile of padding
        may, surely = masks.block_map(mask, q, k, tile, unit)
        assert isinstance(may, np.ndarray) and isinstance(surely, np.ndarray)
        qc, kc = cells(q, "q"), cells(k, "k")
        seen = formula(qc, kc)
        real = np.broadcast_to(qc["valid"] & kc["valid"], seen.shape)

        def blocks(x):
            x = np.pad(x, [(0, 0), (0, 0), (0, -18 % tile), (0, -20 % unit)])
            return x.reshape(*x.shape[:2], -1, tile, x.shape[3] // unit, unit).any((3, 5))

        some, hidden = blocks(seen & real), blocks(~seen & real)
        may, surely = (np.broadcast_to(x, some.shape) for x in (may, surely))
        assert not (some & ~may).any(), "a visible pair would be skipped"
        assert not (hidden & surely).any(), "a hidden pair would be seen"
        assert not (may & ~blocks(real)).any(), "tiles without a valid pair must be skipped"
        dynamic = jax.tree.map(jnp.asarray, k)
        for a, b in zip(masks.block_map(mask, q, dynamic, tile, unit), (may, surely), strict=True):
            np.testing.assert_array_equal(np.broadcast_to(a, b.shape), b)


def test_bounds_are_tight_for_ordered_positions():
    meta = Meta.of(64)
    may, surely = masks.block_map(masks.causal() & masks.window(16), meta, meta, 8, 8)
    i, j = np.arange(8)[:, None], np.arange(8)[None]
    np.testing.assert_array_equal(may[0, 0], (j <= i) & (i - j <= 2))
    np.testing.assert_array_equal(surely[0, 0], (j < i) & (i - j < 2))


def test_masks_are_values():
    a = masks.causal() & (masks.window(8) | ~masks.same("seg"))
    b = masks.causal() & (masks.window(8) | ~masks.same("seg"))
    assert a == b and hash(a) == hash(b) and a != masks.causal() & (masks.window(9) | ~masks.same("seg"))
    assert a.fields() == {"pos", "seg"}


def test_bad_input_is_named():
    meta = Meta.of(4)
    with pytest.raises(ValueError, match="^mask: expected Meta to have the label 'seg', it has none"):
        masks.same("seg")(meta, meta)
    with pytest.raises(ValueError, match="^left: expected at least 1, got 0"):
        masks.window(0)
    with pytest.raises(ValueError, match="^window: expected a whole number"):
        masks.window(4.5)
