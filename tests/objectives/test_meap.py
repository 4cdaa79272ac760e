"""MEAP: which inputs are masked, what is predicted, counts per response, and nothing else changed."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core.types import State
from jaxattn.objectives.meap import corrupt_responses, mask_positions, meap
from jaxattn.objectives.next_token import next_token

MASK, V = 30, 31
BATCH = jax.jit(lambda method, batch, key: method.batch(batch, key), static_argnums=0)
COPY = jax.jit(corrupt_responses, static_argnums=2)
LOSS = jax.jit(lambda method, batch, key: method.loss({}, State(), forward, batch, key), static_argnums=0)


def record(b=3, t=40, seed=0):
    stream = np.random.default_rng(seed).integers(1, 30, (b, t + 1)).astype(np.int32)
    return {"tokens": stream[:, :-1], "targets": stream[:, 1:], "loss_mask": np.ones((b, t), np.float32)}


def forward(batch):
    """Logits that depend on the inputs alone."""
    table = np.random.default_rng(1).normal(size=(V, V)).astype(np.float32)
    return SimpleNamespace(logits=jnp.asarray(table)[batch["tokens"]])


def test_pretraining_masks_inputs_and_nothing_else():
    batch = record()
    seen = []
    for i in range(20):
        new = BATCH(meap(MASK), batch, jax.random.key(i))
        masked = np.asarray(new["tokens"]) == MASK
        assert (masked.sum(1) == 6).all() and not masked[:, -1].any() and (masked == masked[0]).all()
        np.testing.assert_array_equal(np.where(masked, batch["tokens"], new["tokens"]), batch["tokens"])
        np.testing.assert_array_equal(new["targets"], batch["targets"])
        seen.append(masked[0])
    seen = np.array(seen)
    assert len(np.unique(seen, axis=0)) > 15 and seen.any(0).sum() > 30
    few = [BATCH(meap(MASK, patterns=3), batch, jax.random.key(i))["tokens"][0] == MASK for i in range(20)]
    assert len(np.unique(few, axis=0)) in (2, 3)
    assert np.unique(mask_positions(jax.random.key(0), 9, 8)).tolist() == list(range(8))
    assert (BATCH(meap(MASK, ratio=0.01), batch, jax.random.key(0))["tokens"] == MASK).sum() == 3  # at least one a row
    # 0.7 is below 0.7 in float32; the count is still 28.
    assert (BATCH(meap(MASK, ratio=0.7), batch, jax.random.key(0))["tokens"][0] == MASK).sum() == 28


def test_pretraining_loss():
    batch, key = record(), jax.random.key(3)
    loss = lambda method: LOSS(method, batch, key)  # noqa: E731
    plain, metrics = loss(next_token())
    np.testing.assert_array_equal(loss(meap(MASK, ratio=0.0))[0], plain)
    found, masked_metrics = loss(meap(MASK, chunk=7))
    assert metrics["weight"] == masked_metrics["weight"] == batch["targets"].size
    new = BATCH(meap(MASK), batch, key)
    log_p = jax.nn.log_softmax(forward(new).logits)
    expected = -np.take_along_axis(np.asarray(log_p), batch["targets"][..., None], -1).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert abs(found - plain) > 1e-3


def responses(lengths, t, prompt=5):
    """One sample per row: prompt, a response of ``lengths`` tokens, end of sequence (id 0), padding."""
    batch = record(len(lengths), t)
    at = np.arange(t)[None]
    n = np.array(lengths)[:, None]
    batch["loss_mask"] = ((at >= prompt - 1) & (at < prompt + n)).astype(np.float32)  # the response and its end
    batch["targets"] = np.where(at == prompt + n - 1, 0, batch["targets"]).astype(np.int32)
    batch["tokens"] = np.concatenate([batch["tokens"][:, :1], batch["targets"][:, :-1]], 1)
    return batch


def test_fine_tuning_copy():
    lengths = [51, 50, 70, 8, 119]
    batch = responses(lengths, 128)
    new = COPY(jax.random.key(0), batch, MASK, 0.1, 50)
    masked = np.asarray(new["tokens"]) == MASK
    counts = [5, 0, 7, 0, 11]
    assert masked.sum(1).tolist() == counts and np.asarray(new["loss_mask"]).sum(1).tolist() == counts
    # The loss sits one position before each mask; its target is the hidden token and never the end of sequence.
    np.testing.assert_array_equal(np.asarray(new["loss_mask"])[:, :-1], masked[:, 1:])
    assert (batch["targets"][np.asarray(new["loss_mask"]) > 0] != 0).all()
    np.testing.assert_array_equal(batch["tokens"][masked], np.asarray(new["targets"])[np.asarray(new["loss_mask"]) > 0])
    for row, n in zip(masked, lengths, strict=True):
        assert not row[:5].any() and not row[5 + n :].any()
    both = BATCH(meap(MASK, form="sft"), batch, jax.random.key(0))
    assert both["tokens"].shape == (10, 128)
    for name, x in batch.items():
        np.testing.assert_array_equal(both[name][:5], x)
    np.testing.assert_array_equal(both["tokens"][5:], new["tokens"])
    copies = [COPY(jax.random.key(i), batch, MASK, 0.5, 50)["tokens"][0] == MASK for i in range(30)]
    assert min(np.flatnonzero(row).min() for row in copies) == 5  # the response's first token can be masked


def test_fine_tuning_counts_per_packed_document():
    a, b = responses([60], 70), responses([20], 30)
    rows = {name: np.concatenate([a[name], b[name], a[name]], 1) for name in a}
    rows["segment"] = np.repeat([1, 2, 3], [70, 30, 70])[None].astype(np.int32)
    masked = np.asarray(COPY(jax.random.key(1), rows, MASK, 0.1, 50)["tokens"])[0] == MASK
    assert [masked[:70].sum(), masked[70:100].sum(), masked[100:].sum()] == [6, 0, 6]


def test_fine_tuning_loss_is_one_mean_over_both():
    batch = responses([51, 50, 70, 8, 119], 128)
    loss, metrics = LOSS(meap(MASK, form="sft"), batch, jax.random.key(0))
    copy = BATCH(meap(MASK, form="sft"), batch, jax.random.key(0))
    plain = LOSS(next_token(), copy, jax.random.key(1))[0]
    np.testing.assert_allclose(loss, plain, rtol=1e-6)
    assert metrics["weight"] == 298 + 5 + 23


def test_record_and_errors():
    assert meap(MASK) == meap(MASK) and hash(meap(MASK)) == hash(meap(MASK, ratio=0.15))
    assert meap(MASK, form="sft").ratio == np.float32(0.1)
    for wrong, name in ((dict(ratio=1.0), "ratio"), (dict(form="mlm"), "form"), (dict(patterns=0), "patterns")):
        with pytest.raises(ValueError, match=name):
            meap(MASK, **wrong)
    with pytest.raises(ValueError, match="mask_id"):
        meap(-1)
    with pytest.raises(ValueError, match="n:"):
        mask_positions(jax.random.key(0), 4, 4)
