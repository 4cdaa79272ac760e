"""The released code of StreamingLLM, H2O and DuoAttention, replayed step by step."""

import jax
import numpy as np
import pytest

from jaxattn.cache.duoattention import duoattention
from jaxattn.cache.h2o import h2o, h2o_mask
from jaxattn.cache.streamingllm import evict_for_space, streamingllm
from tests.cache.harness import Stream, golden_weights, in_time

CLOSE = dict(rtol=0, atol=2e-5)  # the released modules take their softmax in float32, here it is float64
EXACT = dict(rtol=0, atol=1e-9)


def test_streamingllm(golden):
    io = golden("059-streamingllm")
    with jax.enable_x64(True):
        s = Stream(streamingllm(2, 5), golden_weights(io), heads=4, kv_heads=2, length=30, residual=False)
        for i in range(20):
            y = s.feed(io["x"][:, i : i + 1])
            np.testing.assert_allclose(y[0], io["y"][:, i : i + 1], **CLOSE)
            assert s.kept() == [[[p for p in io["kept"][i] if p >= 0]]]
        for head in range(2):
            k, v, _ = in_time(s.state.layer, head=head)
            np.testing.assert_allclose(k, io["k_final"][0, head], **CLOSE)
            np.testing.assert_allclose(v, io["v_final"][0, head], **CLOSE)
        s.state = evict_for_space(s.state, 3, start=2, recent=5)
        np.testing.assert_allclose(in_time(s.state.layer)[0], io["k_after_evict_for_space3"][0, 0], **CLOSE)
        np.testing.assert_allclose(s.feed(io["x_chunk"])[0], io["y_chunk"], **CLOSE)


@pytest.mark.parametrize("name, positions", [("real", "true"), ("stream", "rank")])
def test_h2o(golden, name, positions):
    io = golden("092-h2o")
    with jax.enable_x64(True):
        policy = h2o(3, 4, positions=positions)
        s = Stream(policy, golden_weights(io), heads=4, kv_heads=4, length=30, residual=False)
        for i, (a, b) in enumerate([(0, 12)] + [(t, t + 1) for t in range(12, 18)]):
            np.testing.assert_allclose(s.feed(io["x"][:, a:b])[0], io[f"{name}.y{i}"], **CLOSE)
            assert s.kept() == [io[f"{name}.kept{i}"].tolist()]
            for head in range(4):
                acc = in_time(s.state.layer, head=head)[2]["acc"]
                np.testing.assert_allclose(acc, io[f"{name}.acc{i}"][head], **CLOSE)
        for head in range(4):
            k, v, _ = in_time(s.state.layer, head=head)
            np.testing.assert_allclose(k, io[f"{name}.k_final"][0, head], **CLOSE)
            np.testing.assert_allclose(v, io[f"{name}.v_final"][0, head], **CLOSE)


def test_h2o_mask(golden):
    io = golden("092-h2o")
    with jax.enable_x64(True):
        s = Stream(h2o_mask(3, 3), golden_weights(io), heads=4, kv_heads=4, length=18, residual=False)
        for i, (a, b) in enumerate([(0, 12)] + [(t, t + 1) for t in range(12, 18)]):
            np.testing.assert_allclose(s.feed(io["x"][:, a:b])[0], io[f"mask.y{i}"], **CLOSE)
            stats = s.state.layer.stats
            np.testing.assert_allclose(stats["acc"][0, 0, :, :b], io[f"mask.acc{i}"], **CLOSE)
            np.testing.assert_array_equal(stats["seen"][0, 0, :, :b], io[f"mask.next{i}"][:, :b] > 0)


def test_duoattention(golden):
    io = golden("163-duoattention")
    with jax.enable_x64(True):
        policy = duoattention(np.array([[1.0, 0.0]]), 0.5, sink=3, recent=5)
        s = Stream(policy, golden_weights(io), heads=4, kv_heads=2, length=24, residual=False)
        for i, (a, b) in enumerate(io["deploy_segments"]):
            np.testing.assert_allclose(s.feed(io["x_full"][:1, a:b])[0], io["deploy_y"][:, a:b], **EXACT)
            if i < 2:
                k, v, _ = in_time(s.state.layer["stream"])
                np.testing.assert_allclose(np.stack([k, v]), io[f"deploy_stream_kv_after{i}"][:, 0], **EXACT)
        for store, name in (("stream", "deploy_stream_kv"), ("full", "deploy_full_kv")):
            k, v, _ = in_time(s.state.layer[store])
            np.testing.assert_allclose(np.stack([k, v]), io[name][:, 0], **EXACT)
