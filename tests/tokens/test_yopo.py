"""Four switches on a language model that reads an image, against the plain model and plain arrays."""

from functools import partial

import jax
import numpy as np
import pytest

import models
from jaxattn import tokens
from jaxattn.cache.full import full
from jaxattn.core import mask as masks
from jaxattn.core.attend import attend_call, make_call
from jaxattn.core.types import Ctx, Meta, Spec, State, split
from jaxattn.nn import block
from jaxattn.tokens.yopo import neighbourhood, threshold_for, yopo, yopo_heads
from models.bind import Bound
from models.multimodal import vlm
from tests.models.small import LLM, VLM, images, prompts, rollout, vlm_params

RNG = np.random.default_rng(0)
SIDE, N, T = 4, 16, 9
IMAGE = masks.query_is("kind", 1) & masks.key_is("kind", 1)
HEADS = np.ones((LLM.layers, LLM.block.heads))
HEADS[:, 1::2] = 0


@partial(jax.jit, static_argnums=0, static_argnames="mask")
def run(program, arrays, params, mask=None):
    out, _ = vlm.forward(Bound(program, arrays, params), images(), prompts(), mask=mask)
    return out.logits


def forward(steering=None, mask=None, params=None):
    return np.asarray(run(*vlm.bind(VLM, vlm_params() if params is None else params, steering=steering), mask=mask))


def meta(system=2, text=3):
    """A sequence: system prompt, image, text."""
    n = system + N + text
    at = np.arange(n) - system
    image = (at >= 0) & (at < N)
    labels = {"kind": image, "row": np.where(image, at // SIDE, 0), "col": np.where(image, at % SIDE, 0)}
    return Meta.of(n, **{k: v[None].astype(np.int32) for k, v in labels.items()})


def test_neighbourhood_by_hand():
    m = meta()
    kind, row, col = (m.labels[x][0] for x in ("kind", "row", "col"))
    got = neighbourhood(masks.causal(), 3)(m, m)[0, 0]
    for i in range(m.n):
        for j in range(m.n):
            near = abs(row[i] - row[j]) <= 1 and abs(col[i] - col[j]) <= 1
            assert got[i, j] == (near if kind[i] and kind[j] else j <= i), (i, j)


def test_switches_that_spare_nothing_are_the_model_with_an_image_that_sees_itself():
    both = masks.causal() | IMAGE
    wide = yopo(2 * VLM.vision.grid[0] - 1, np.ones_like(HEADS), LLM.layers, 1)
    np.testing.assert_allclose(forward(wide), forward(mask=both), atol=1e-4)
    plain = forward()
    np.testing.assert_allclose(forward(yopo(None, mlp=1)), plain, atol=1e-5)
    for one in (yopo(3, mlp=1), yopo(None, HEADS, LLM.layers, 1), yopo(None, np.ones_like(HEADS), 2, 1)):
        assert np.abs(forward(one) - plain).max() > 1e-3  # each switch acts by itself


def steered(record, v, layer=0, k=None):
    """The record's attention of one layer on random rows with values v [1, S, 4, 1]: [S, 4]."""
    m = meta()
    rng = np.random.default_rng(1)
    q, keys = (rng.normal(size=(1, m.n, 4, 8)).astype(np.float32) for _ in range(2))
    program, params = split(record, Spec(layers=2, heads=4, kv_heads=4, head_dim=8))
    call = make_call(q, keys if k is None else k, v, q_meta=m, k_meta=m, mask=masks.causal())
    ctx = Ctx(layer=layer, phase="prefill")
    part = attend_call(program.call(params, State(), call, ctx))[0]
    return np.asarray(program.heads(params, State(), part.out, m, ctx)[0])[0, :, :, 0]


def test_a_pruned_head_takes_nothing_of_the_image():
    m = meta()
    image = m.labels["kind"][0] == 1
    text = np.arange(m.n) >= 2 + N
    ones = np.ones((1, m.n, 4, 1), np.float32)
    other = np.where(image[None, :, None, None], 1e3, ones).astype(np.float32)
    table = np.array([[1, 0, 1, 0], [1, 1, 1, 1]])
    record = yopo(None, table, cut=1, mlp=1)
    rows = steered(record, ones)
    np.testing.assert_array_equal(rows[:, 1::2], steered(record, other)[:, 1::2])  # exactly nothing
    assert (rows[text][:, 1::2] < 0.9).all() and (rows[image][:, 1::2] == 0).all()
    np.testing.assert_allclose(rows[:, ::2], 1.0, atol=1e-5)  # rows of the others still sum to one
    assert (steered(record, other)[text][:, ::2] > 10).all()
    behind = steered(record, ones, layer=1)  # behind the cut: every head
    np.testing.assert_array_equal(behind[text], steered(record, other, layer=1)[text])
    assert (behind[text] < 0.9).all() and (behind[image] > 0).all()
    # What is left of a row is its plain probability on text: no renormalisation.
    plain = steered(yopo(None, mlp=1), (~image[None, :, None, None] * ones).astype(np.float32), layer=1)
    np.testing.assert_allclose(behind, plain, atol=1e-5)


def test_image_rows_use_the_first_neurons():
    x = RNG.normal(size=(1, 7, 16)).astype(np.float32)
    p = jax.tree.map(lambda a: a[0], vlm_params()["llm"]["layers"])
    half = LLM.block.hidden // 2
    got = block.mlp_output(p, LLM.block, x, ((0, 4, half), (4, 7, 2 * half)))[1]
    mlp = {n: {"kernel": a["kernel"] * (np.arange(2 * half) < half)} for n, a in p["mlp"].items() if n != "down"}
    spared = {**p, "mlp": {**mlp, "down": p["mlp"]["down"]}}
    np.testing.assert_allclose(got[:, :4], block.mlp_output(spared, LLM.block, x)[1][:, :4], atol=1e-5)
    np.testing.assert_allclose(got[:, 4:], block.mlp_output(p, LLM.block, x)[1][:, 4:], atol=1e-5)
    # A model whose other neurons say nothing does not miss them.
    params = vlm_params()
    kernel = params["llm"]["layers"]["mlp"]["down"]["kernel"].at[:, half:].set(0)
    silent = {**params["llm"]["layers"], "mlp": {**params["llm"]["layers"]["mlp"], "down": {"kernel": kernel}}}
    params = {**params, "llm": {**params["llm"], "layers": silent}}
    np.testing.assert_allclose(forward(yopo(None, mlp=2), params=params), forward(params=params), atol=1e-4)


def test_decoding_is_the_whole_pass():
    steering = yopo(3, HEADS, 4, 2)
    bound = vlm.bind(VLM, vlm_params(), steering=steering, cache=full())
    look = jax.jit(lambda x: vlm.forward(Bound(*bound), images(), x)[0].logits)
    found = models.generate(bound, prompts(), image=images(), steps=3)
    np.testing.assert_array_equal(found, rollout(look, prompts(), [T, T], 3))


def test_heads_are_voted_for():
    ratio = RNG.uniform(size=(10, 4, 3))
    got = yopo_heads(ratio, 0.5, votes=0.4)
    want = [[sum(ratio[s, i, h] > 0.5 for s in range(10)) > 4 for h in range(3)] for i in range(4)]
    np.testing.assert_array_equal(got[2:], want[2:])
    assert got[:2].all()
    for share in (0.5, 0.6, 0.8, 1.0):
        t = threshold_for(ratio, share)
        assert yopo_heads(ratio, t).mean() >= share
        assert t >= ratio.max() or yopo_heads(ratio, np.nextafter(ratio[ratio > t].min(), 2)).mean() < share
    with pytest.raises(ValueError, match="ratio: expected"):
        yopo_heads(ratio[0], 0.5)
    with pytest.raises(ValueError, match="window: expected an odd number"):
        yopo(4)
    assert tokens.yopo is yopo
