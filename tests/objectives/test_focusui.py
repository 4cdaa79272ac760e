"""The label that FocusUI's scorer learns from boxes, and what its stages train."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import objectives, tokens
from jaxattn.core.types import State

BOX = np.array([[[2, 3, 9, 11], [0, 8, 4, 16]], [[5, 5, 8, 6], [-1, -1, -1, -1]]], np.int32)  # top, left, bottom, right


def test_shares_of_patches():
    found = np.asarray(jax.jit(objectives.target_share, static_argnums=(1, 2))(BOX, 4, 4)).reshape(2, 4, 4)
    for b in range(2):
        each = [tokens.box_share((x0, y0, x1, y1), (4, 4), 4) for y0, x0, y1, x1 in BOX[b] if y0 >= 0]
        np.testing.assert_allclose(found[b], np.max(each, 0), atol=1e-6)


def outcome(scores):
    told = {"scores": scores, "kept": scores > 0}
    return types.SimpleNamespace(aux={"sites": {"project": told}}, loss=jnp.float32(3), metrics={})


def test_both_stages():
    image, scores = np.zeros((2, 16, 16, 1), np.float32), np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    label = 2 * np.asarray(objectives.target_share(BOX, 4, 4)) - 1
    p = np.exp(label) / np.exp(label).sum(-1, keepdims=True)
    error = (p * (np.log(p) - jax.nn.log_softmax(scores))).sum(-1).mean()
    np.testing.assert_allclose(tokens.scorer_loss(scores, label), error, rtol=1e-5)
    for record, want, rate in ((objectives.focusui(), error, 0), (objectives.focusui(0.1, 1.0), 0.1 * error + 3, 1)):
        for batch in ({"image": image, "box": BOX}, {"image": image, "label": label}):
            loss, metrics = record.loss({}, State(), lambda _: outcome(scores), batch, None)
            np.testing.assert_allclose(loss, want, rtol=1e-5)
            np.testing.assert_allclose(metrics["target_kept"], ((scores > 0) & (label > 0)).sum() / (label > 0).sum())
        assert record.rates["model"] == rate
    with pytest.raises(ValueError, match="batch: expected boxes of the targets"):
        objectives.focusui().loss({}, State(), lambda _: outcome(scores), {"image": image}, None)
