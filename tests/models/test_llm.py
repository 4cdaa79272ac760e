"""The language model against its formula, packing, precision, rematerialisation, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import tokens as token_methods
from jaxattn.core.types import Meta
from models import llm
from models.bind import Bound
from tests.models import reference
from tests.models.small import LLM, SHIPPED, close, llm_params, prompts, read, sharpen


def disturb(params, seed=0):
    """Norms and biases that are not what they are at the start."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(treedef, [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True, "tie": False},
        {"window": 4, "qkv_bias": True, "mlp_bias": True, "out_bias": True, "base": 500.0},
        {"rope": False, "kv_heads": 4, "norm": "layer", "gated": False, "activation": "quick_gelu", "layer_scale": True},
    ],
    ids=["llama", "qwen3", "mistral-qwen2", "gpt"],
)
def test_logits_are_those_of_the_formula(changes):
    c = llm.tiny(vocab=40, **({"layers": 2, "dim": 16, "hidden": 32} | changes))
    params = disturb(sharpen(llm.init(c), 2.0))
    bound = llm.bind(c, params)
    close(read(*bound, prompts()), reference.llm(params, c, prompts()), atol=2e-3)


def test_packed_segments_are_as_if_alone():
    bound = llm.bind(LLM, llm_params())
    tokens = prompts(n=12)[:1]
    record = {"segment": np.array([[1] * 5 + [2] * 4 + [3] * 2 + [0]]),
              "position": np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 0]])}  # fmt: skip

    @jax.jit
    def packed(params, tokens):
        meta, mask = llm.record_meta(record)
        return llm.forward(Bound(bound.program, bound.arrays, params), tokens, meta=meta, mask=mask).logits

    found = np.asarray(packed(bound.params, tokens))
    assert np.isfinite(found).all()
    for start, stop in ((0, 5), (5, 9), (9, 11)):
        close(found[:, start:stop], reference.llm(llm_params(), LLM, tokens[:, start:stop]), atol=2e-3)
    others = tokens.copy()
    others[:, :5] = (others[:, :5] + 1) % 40
    np.testing.assert_array_equal(np.asarray(packed(bound.params, others))[:, 5:], found[:, 5:])


def test_padding_and_offsets_change_nothing():
    bound, tokens = llm.bind(LLM, llm_params()), prompts()
    short = np.asarray(read(*bound, tokens))
    wide = np.concatenate([tokens, np.full((2, 3), 39, np.int32)], 1)
    meta = llm.text_meta(jnp.asarray(wide), pad=39)
    meta = meta.replace(valid=jnp.asarray(np.broadcast_to(np.arange(12) < 9, (2, 12))))
    close(np.asarray(read(*bound, wide, meta))[:, :9], short)
    close(read(*bound, tokens, llm.text_meta(jnp.asarray(tokens), start=100)), short, atol=2e-3)


def test_bfloat16_is_finite_and_near():
    bound = llm.bind(LLM, llm.init(LLM))
    tokens = prompts()

    @jax.jit
    def low(params):
        out = llm.forward(Bound(bound.program, bound.arrays, params), tokens, dtype=jnp.bfloat16)
        return out.logits, out.hidden

    logits, hidden = low(bound.params)
    assert logits.dtype == jnp.float32 and hidden.dtype == jnp.bfloat16
    close(logits, read(*bound, tokens), atol=0.05)
    grads = jax.jit(jax.grad(lambda p: low(p)[0].std()))(bound.params)
    assert all(np.isfinite(x).all() and x.dtype == jnp.float32 for x in jax.tree.leaves(grads))


def test_remat_changes_no_gradient():
    tokens, found = prompts(), []
    for remat in (False, True):
        bound = llm.bind(LLM, None, remat=remat)

        def loss(params, bound=bound):
            logits = llm.forward(Bound(bound.program, bound.arrays, params), tokens).logits
            return -jax.nn.log_softmax(logits)[:, :-1][..., 3].mean()

        step = jax.jit(jax.value_and_grad(loss), compiler_options=SHIPPED)
        found.append(step(llm_params()))
        names = str(step.trace(llm_params()).jaxpr)
        assert ("remat" in names or "checkpoint" in names) == remat
    jax.tree.map(lambda a, b: close(a, b, atol=1e-5), *found)


def test_gradients_agree_with_finite_differences():
    bound, tokens = llm.bind(LLM, llm.init(LLM)), prompts()
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), bound.params)
        loss = jax.jit(lambda p: llm.forward(Bound(bound.program, bound.arrays, p), tokens).logits[..., 3].mean())
        way = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(x.size).normal(size=x.shape)), params)
        at = lambda t: float(loss(jax.tree.map(lambda x, w: x + t * w, params, way)))  # noqa: E731
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, w: (g * w).sum(), jax.grad(loss)(params), way)))
        np.testing.assert_allclose(float(slope), (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-5)


def test_what_is_refused():
    params = llm_params()
    with pytest.raises(ValueError, match=r"tokens: expected \[batch, tokens\], got shape \(9,\)"):
        llm.forward(llm.bind(LLM, params), prompts()[0])
    with pytest.raises(ValueError, match="reduce: expected 'llm' or 'llm.<layer>'"):
        llm.bind(LLM, params, reduce={"vision": token_methods.uniform(4)})
    with pytest.raises(ValueError, match=r"reduce\[llm.9\]: expected a layer between 1 and 5, .*got 9"):
        llm.bind(LLM, params, reduce={"llm.9": token_methods.uniform(4)})
    with pytest.raises(ValueError, match=r"reduce\[llm.*\]: expected a layer between 1 and 5"):
        llm.bind(LLM, params, reduce={"llm.first": token_methods.uniform(4)})
    with pytest.raises(ValueError, match="unknown attention 'flexprefil'.*did you mean flexprefill"):
        llm.bind(LLM, params, attention="flexprefil")
    with pytest.raises(ValueError, match="unknown cache 'h20'.*did you mean h2o"):
        llm.bind(LLM, params, cache="h20:budget=4")
    with pytest.raises(ValueError, match="cache: expected a method's record or its name, got dict"):
        llm.bind(LLM, params, cache={})
    with pytest.raises(ValueError, match="heads: expected a multiple of kv_heads"):
        llm.tiny(heads=4, kv_heads=3)
    with pytest.raises(ValueError, match="layers: expected at least 1"):
        llm.tiny(layers=0)
    with pytest.raises(ValueError, match="attention.which: expected one per layer, 6"):
        from models import by_layer, dense

        llm.bind(LLM, params, attention=by_layer((dense(),), (0, 0)))
    with pytest.raises(ValueError, match="mask: expected Meta to have the label 'segment'"):
        from jaxattn.core import mask as masks

        llm.forward(llm.bind(LLM, params), prompts(), meta=Meta.of(9), mask=masks.same("segment"))
