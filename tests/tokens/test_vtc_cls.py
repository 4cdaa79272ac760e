import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import tokens
from jaxattn.core.types import Ctx, Meta, State, Tokens, split

L, B, H, N, K = 6, 2, 3, 20, 8
RNG = np.random.default_rng(0)
ROWS = RNG.dirichlet(np.ones(N + 1), size=(L, B, H)).astype(np.float32)
FACTS = {f"cls.{i}": jnp.asarray(ROWS[i, ..., 1:].mean(1)) for i in range(L)}


def kept(record, facts=FACTS):
    program, params = split(record)
    out = program.apply(params, State(), Tokens(np.zeros((B, N, 1), np.float32), Meta.of(N)), facts, Ctx())[0]
    return np.asarray(out.meta.pos)


def test_layers_add_up():
    record = tokens.vtc_cls(K, start=2).resolve(L)
    assert [need.at for need in record.needs()] == ["vision.2", "vision.3", "vision.4"]
    want = ROWS[2:5, ..., 1:].mean(2).sum(0)
    np.testing.assert_allclose(tokens.vtc_cls_scores(ROWS, 2), want, rtol=1e-5)
    np.testing.assert_array_equal(kept(record), np.sort(np.argsort(-want, -1)[:, :K], -1))
    for how in ("min", "max"):
        want = getattr(np, how)(ROWS[2:5, ..., 1:].mean(2), 0)
        picked = kept(tokens.vtc_cls(K, start=2, combine=how).resolve(L))
        np.testing.assert_array_equal(picked, np.sort(np.argsort(-want, -1)[:, :K], -1))


def test_one_layer_is_fastervlm():
    one = kept(tokens.vtc_cls(K, start=L - 2).resolve(L))
    np.testing.assert_array_equal(one, kept(tokens.fastervlm(K), {"cls": FACTS[f"cls.{L - 2}"]}))
    # what a layer adds to all, and whatever the last layer says, changes nothing
    facts = {**FACTS, "cls.3": FACTS["cls.3"] + 1.0, f"cls.{L - 1}": FACTS["cls.0"]}
    record = tokens.vtc_cls(K, start=2).resolve(L)
    np.testing.assert_array_equal(kept(record, facts), kept(record))


def test_depth():
    assert tokens.vtc_cls(K).resolve(24).start == 16
    with pytest.raises(ValueError, match="start: expected a layer of 6 before the last"):
        tokens.vtc_cls(K, start=5).resolve(L)
    with pytest.raises(ValueError, match="depth: expected resolve"):
        tokens.vtc_cls(K).needs()
