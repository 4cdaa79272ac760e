"""FlexPrefill: its released block masks, the forced blocks, and the cases in which it is dense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core.attend import attend, attend_call, make_call
from jaxattn.core.mask import causal
from jaxattn.core.types import Ctx, Meta, State, View, split
from jaxattn.sparse.flexprefill import flexprefill, flexprefill_blocks

BLOCKS = jax.jit(flexprefill_blocks, static_argnames=("block", "min_budget", "max_budget", "count_block"))


@pytest.fixture(scope="module")
def io(golden):
    return golden("139-flexprefill")


def blocks(io, **changes):
    how = dict(block=32, gamma=float(io["gamma"]), tau=float(io["tau"]), min_budget=64) | changes
    return BLOCKS(io["q"], io["k"], **how)


def test_golden_masks_and_profiles(io):
    found = blocks(io)
    for name, theirs in (("vertical", "vertical"), ("slash", "slash"), ("vertical_block", "vertical_block"),
                         ("pooled", "avg_qk"), ("sqrt_jsd", "sqrt_jsd")):  # fmt: skip
        np.testing.assert_allclose(found[name], io[theirs], atol=1e-5, rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(found["mask"][0], io["block_mask"])
    out = attend(io["q"], io["k"], io["v"], where=found["where"], mask=causal()).out
    np.testing.assert_allclose(out[:, -64:], io["out_tail"], atol=1e-5)


def test_profile_is_the_mean_of_the_last_rows(rng):
    q, k = rng.normal(size=(2, 1, 45, 2, 4)).astype(np.float32)
    found = BLOCKS(q, k, block=8)
    s = np.einsum("nhd,mhd->hnm", q[0, -8:], k[0]) / 2
    s = np.where(np.arange(45) <= np.arange(37, 45)[:, None], s, -np.inf)
    p = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
    np.testing.assert_allclose(found["vertical"][0], p.mean(1), atol=1e-6)
    diagonals = np.zeros((2, 45))
    for i in range(8):
        for j in range(38 + i):
            diagonals[:, 44 - (37 + i - j)] += p[:, i, j] / 8
    np.testing.assert_allclose(found["slash"][0], diagonals, atol=1e-6)


def test_padding_behind_a_prompt_changes_nothing(io):
    """A prompt of whole blocks, padded with garbage: the pattern is that of the prompt alone."""
    pad = [(0, 0), (0, 64), (0, 0), (0, 0)]
    garbage, longer = dict(constant_values=3.0), dict(mode="wrap")
    q, k = (np.concatenate([np.pad(io[n], pad, **garbage), np.pad(io[n][:, ::-1], pad, **longer)]) for n in "qk")
    how = dict(block=32, gamma=0.6, tau=0.45, min_budget=64)
    padded = BLOCKS(q, k, valid=np.arange(576) < np.array([[512], [576]]), **how)
    for row, alone in ((0, BLOCKS(io["q"], io["k"], **how)), (1, BLOCKS(q[1:], k[1:], **how))):
        n, m = alone["vertical"].shape[-1], alone["mask"].shape[-1]
        np.testing.assert_allclose(padded["vertical"][row, :, :n], alone["vertical"][0], atol=1e-6)
        np.testing.assert_allclose(padded["slash"][row, :, 576 - n :], alone["slash"][0], atol=1e-6)
        np.testing.assert_allclose(padded["sqrt_jsd"][row], alone["sqrt_jsd"][0], atol=1e-5)
        np.testing.assert_array_equal(padded["mask"][row, :, :m, :m], alone["mask"][0])


def test_forced_blocks_budgets_and_causality(io):
    for gamma in (0.0, 0.3):
        mask = np.asarray(blocks(io, gamma=gamma, tau=0.0, max_budget=96)["mask"])
        assert mask[..., np.arange(16), np.arange(16)].all() and mask[..., 0].all()
        assert not np.triu(mask, 1).any()
    # Budgets of two columns and two diagonals (a diagonal may cross a column).
    assert (mask.sum(-1) <= 6).all() and (mask[:, :, 4:].sum(-1) >= 2).all()
    aware = np.asarray(blocks(io, tau=1.0)["mask"])
    assert (aware | ~np.asarray(blocks(io, tau=1.0, gamma=0.3)["mask"])).all()


def test_a_dominant_column_and_a_dominant_diagonal_are_found():
    n, block, d = 256, 16, 32
    q = np.zeros((1, n, 2, d), np.float32)
    k = np.zeros((1, n, 2, d), np.float32)
    q[:, :, 0, 0], k[:, 101, 0, 0] = 60, 10  # head 0: column 101, in block 6
    angle = 2 * np.pi * np.arange(n)[:, None] * np.arange(1, d // 2 + 1) / n
    far = np.roll(np.concatenate([np.cos(angle), np.sin(angle)], -1), 48, axis=0)  # head 1: 48 tokens back, 3 blocks
    q[:, :, 1], k[:, :, 1] = 8 * far, np.concatenate([np.cos(angle), np.sin(angle)], -1)
    mask = np.asarray(BLOCKS(q, k, block=block, gamma=0.9, tau=0.0, min_budget=32)["mask"])[0]
    assert mask[0, 6:, 6].all()
    assert mask[1, np.arange(3, 16), np.arange(13)].all() and mask[1].sum() < 16 * 6


def apply(method, call):
    program, params = split(method)
    return program.apply(params, State(), call, Ctx())[0].out


def test_full_coverage_short_prompts_and_decoding_are_dense(rng):
    q = rng.normal(size=(2, 100, 4, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 100, 2, 8)).astype(np.float32)
    call = make_call(q, k, v, mask=causal())
    dense = attend_call(call)[0].out
    # count_block = block: the count of lines reaches all blocks, as 128 does at the released block size.
    everything = flexprefill(gamma=1.1, block=16, min_budget=16, count_block=16)
    np.testing.assert_allclose(apply(everything, call), dense, atol=1e-5)
    for short in (flexprefill(gamma=0.1, block=64), flexprefill(gamma=0.1, block=16, min_budget=100)):
        np.testing.assert_array_equal(apply(short, call), dense)
    sparse = flexprefill(gamma=0.1, tau=0.0, block=8, min_budget=8)
    assert np.abs(apply(sparse, call) - dense).max() > 1e-2
    past = View(k[:, :99], v[:, :99], Meta.of(99))
    new = Meta.of(1, pos=np.array([[99]]))
    last = make_call(q[:, 99:], k[:, 99:], v[:, 99:], mask=causal(), past=(past,), q_meta=new, k_meta=new)
    np.testing.assert_allclose(apply(sparse, last), dense[:, 99:], atol=1e-5)


def test_record_and_operands(rng):
    assert flexprefill(0.9) == flexprefill(0.9) and hash(flexprefill(0.9)) == hash(flexprefill(0.9))
    q, k, v = rng.normal(size=(3, 1, 70, 2, 8)).astype(jnp.bfloat16)
    traces = []

    @jax.jit
    def run(params, q, k, v):
        traces.append(1)
        part, _, aux = program.apply(params, State(), make_call(q, k, v, mask=causal()), Ctx())
        return part.out, aux["density"]

    found = []
    for gamma in (0.2, 0.9):
        program, params = split(flexprefill(gamma, block=8, min_budget=8, count_block=8))
        out, density = run(params, q, k, v)
        assert out.dtype == jnp.bfloat16 and np.isfinite(np.asarray(out, np.float32)).all()
        found.append(float(density.mean()))
    assert len(traces) == 1 and found[0] < found[1] <= 0.6
    with pytest.raises(ValueError, match="max_budget"):
        flexprefill(min_budget=512, max_budget=256)
