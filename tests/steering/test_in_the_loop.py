"""Steering bound to a model: identity where nothing is asked, decoding as the whole pass, no new compiles."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.cache.full import full
from jaxattn.core.types import Meta
from jaxattn.steering.var import var
from jaxattn.steering.vhr import vhr
from jaxattn.steering.zerotuning import zerotuning
from models import stack
from models.bind import Bound, subset
from models.language import llm

B, N, IMAGE = 2, 16, slice(2, 9)
CONFIG = llm.tiny(vocab=24, layers=4, dim=16, hidden=16, tie=False)


@pytest.fixture(scope="module")
def model():
    """A small model with massive activations on channel 3 of token 5, which lies before and inside the image."""
    params = jax.tree.map(lambda x: 2 * x, llm.init(CONFIG))
    table = 10 * params["embed"]["embedding"]
    table = table.at[:, 3].set(0).at[5, 3].set(400)
    tokens = np.random.default_rng(0).integers(6, 24, (B, N + 1)).astype(np.int32)
    tokens[:, [0, 4]] = 5
    return {**params, "embed": {"embedding": table}}, tokens


def meta_of(n, start=0, paired=False):
    pos = np.arange(start, start + n)
    kind = ((pos >= IMAGE.start) & (pos < IMAGE.stop)).astype(np.int32)
    valid = np.ones((B, n), bool)
    if paired:
        valid = np.concatenate([valid, np.broadcast_to(kind == 0, (B, n))])
    full = lambda x: jnp.asarray(np.broadcast_to(x, valid.shape))  # noqa: E731
    return Meta(full(pos.astype(np.int32)), jnp.asarray(valid), labels={"kind": full(kind)})


@partial(jax.jit, static_argnums=0, static_argnames="phase")
def forward(program, arrays, params, tokens, meta, phase):
    out = llm.forward(Bound(program, arrays, params), tokens, meta=meta, phase=phase, new_rows=2)
    return out.logits, out.stack.caches, out.stack.states


@partial(jax.jit, static_argnums=0)
def step(program, arrays, params, token, meta, caches, states):
    streams = stack.streams_of({"text": (llm.embed(params, program.config, token), meta)})
    out = stack.run(params, program.stack("llm"), subset(arrays, "llm"), streams, phase="decode", caches=caches,
                    states=states, step=1)  # fmt: skip
    bound = Bound(program, arrays, params)
    return llm.finish(bound, out).logits, out.states


def bind(params, *steering):
    return llm.bind(CONFIG, params, cache=full(), steering=steering or None)


def test_decoding_equals_the_whole_pass_and_operands_compile_nothing(model):
    params, tokens = model
    plain = bind(params)
    dense = forward(*plain, tokens[:, :N], meta_of(N), phase="train")[0]
    last = meta_of(1, N).replace(labels={})  # a decoded token has no label: it is text

    before, found = forward._cache_size(), {}
    for name, keep, gamma in (("nothing", 1.0, 1.0), ("both", 0.3, 0.2)):
        bound = bind(params, var((3,), tau=3.0, keep=keep, rho=0.9, summ=0.05), zerotuning(gamma, heads=(0, 3)))
        whole = forward(*bound, tokens, meta_of(N + 1), phase="train")[0]
        logits, caches, states = forward(*bound, tokens[:, :N], meta_of(N), phase="prefill")
        np.testing.assert_allclose(logits, whole[:, :N], atol=1e-3)
        one, _ = step(*bound, tokens[:, N:], last, caches, states)
        np.testing.assert_allclose(one[:, 0], whole[:, N], atol=1e-3)
        found[name] = np.asarray(logits)
    assert forward._cache_size() == before + 2  # two phases, not two methods
    np.testing.assert_allclose(found["nothing"], dense, atol=1e-3)
    assert np.abs(found["both"] - dense).max() > 1e-2

    # VAR alone moves nothing before the end of the image.
    alone = bind(params, var((3,), tau=3.0, keep=0.3, rho=0.9, summ=0.05), zerotuning(1.0))
    gap = np.abs(np.asarray(forward(*alone, tokens[:, :N], meta_of(N), phase="prefill")[0]) - dense).max((0, 2))
    assert gap[: IMAGE.stop].max() < 1e-3 and gap[IMAGE.stop :].max() > 1e-2


def test_vhr_finds_its_heads_at_prefill_and_keeps_them(model):
    params, tokens = model
    tokens = np.concatenate([tokens, tokens])
    for alpha in (1.0, 2.0):
        bound = bind(params, vhr(alpha, layers=(1, -1)))
        logits, caches, states = forward(*bound, tokens[:, :N], meta_of(N, paired=True), phase="prefill")
        gains = np.asarray(states["steering.0"].layer)
        assert gains.shape == (4, 2 * B, 4) and (gains[[0, 2]] == 1).all()
        np.testing.assert_array_equal(gains[:, :B], gains[:, B:])
        last = meta_of(1, N)
        last = Meta(jnp.tile(last.pos, (2, 1)), jnp.tile(last.valid, (2, 1)))
        _, after = step(*bound, tokens[:, N:], last, caches, states)
        np.testing.assert_array_equal(after["steering.0"].layer, gains)
        if alpha == 1.0:
            assert (gains == 1).all()
            dense = forward(*bind(params), tokens[:B, :N], meta_of(N), phase="train")[0]
            np.testing.assert_allclose(logits[:B], dense, atol=1e-3)
    assert ((gains[[1, 3]] == 2).sum(-1) <= 2).all() and (gains[3] == 2).any()
    assert np.abs(logits[:B] - dense).max() > 1e-2
