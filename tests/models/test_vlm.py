"""The vision-language model against its formula, packed questions, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import cache
from jaxattn import tokens as token_methods
from models import vlm
from models.bind import Bound
from tests.models import reference
from tests.models.small import LLM, TOWER, VLM, close, images, look, prompts, vlm_params


def formula(params, image, tokens):
    """Logits of the text rows [B, T, V]."""
    p = reference.tree(params)
    rows, _, _ = reference.tower(params["vision"], TOWER, image, stop=TOWER.layers - 1)  # select = -2
    rows = rows[:, TOWER.special :]
    x = reference.dense(p["projector"]["down"], reference.ACTIVATIONS["gelu"](reference.dense(p["projector"]["up"], rows)))
    x = np.concatenate([x + p["projector"]["pos"], p["llm"]["embed"]["embedding"][tokens]], 1)
    order = np.arange(x.shape[1])
    seen = np.broadcast_to(order[:, None] >= order, (len(x), len(order), len(order)))
    x, _, _ = reference.run(p["llm"], LLM.block, LLM.layers, x, np.broadcast_to(order, x.shape[:2]), seen)
    x = reference.norm(p["llm"]["norm"], x, LLM.block.eps)[:, rows.shape[1] :]
    return x @ p["llm"]["embed"]["embedding"].T


def test_logits_are_those_of_the_formula():
    bound = vlm.bind(VLM, vlm_params())
    close(look(*bound, images(), prompts()), formula(vlm_params(), images(), prompts()), atol=5e-3)


def test_packed_questions_do_not_see_each_other():
    bound = vlm.bind(VLM, vlm_params())
    tokens = prompts(n=9)
    batch = {"segment": np.tile([1, 1, 1, 1, 2, 2, 2, 3, 0], (2, 1)),
             "position": np.tile([0, 1, 2, 3, 0, 1, 2, 0, 0], (2, 1))}  # fmt: skip

    @jax.jit
    def packed(params, tokens):
        meta, mask = vlm.question_meta(VLM, batch)
        return vlm.forward(Bound(bound.program, bound.arrays, params), images(), tokens, meta=meta, mask=mask)[0].logits

    found = np.asarray(packed(bound.params, tokens))
    assert np.isfinite(found).all()
    for start, stop in ((0, 4), (4, 7), (7, 8)):
        close(found[:, start:stop], formula(vlm_params(), images(), tokens[:, start:stop]), atol=5e-3)


def test_bfloat16_gradients_reach_every_part():
    bound = vlm.bind(VLM, None, remat=True)

    @jax.jit
    @jax.grad
    def slope(params):
        out, _ = vlm.forward(Bound(bound.program, bound.arrays, params), images(), prompts(), dtype=jnp.bfloat16)
        return jax.nn.log_softmax(out.logits)[:, 0].mean()

    found = slope(vlm.init(VLM))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    for name in ("vision", "projector", "llm"):
        assert any(np.abs(x).max() > 0 for x in jax.tree.leaves(found[name])), name


def test_what_is_refused():
    params, keep = vlm_params(), token_methods.uniform
    with pytest.raises(ValueError, match="reduce: expected vision, vision.<layer>, project, llm or llm.<layer>, got 'visual'"):
        vlm.bind(VLM, params, reduce={"visual": keep(4)})
    with pytest.raises(ValueError, match=r"expected .*16.*got 17"):
        vlm.bind(VLM, params, reduce={"vision": keep(17)})
    with pytest.raises(ValueError, match=r"expected .*8.*got 9"):
        vlm.bind(VLM, params, reduce={"vision.1": keep(8), "vision": keep(6), "llm.2": keep(9)})
    with pytest.raises(ValueError, match="keep: expected a whole number of rows, at least 1"):
        vlm.bind(VLM, params, reduce={"vision": keep(0)})
    with pytest.raises(ValueError, match="unknown tokens 'hiprun'.*did you mean hiprune"):
        vlm.bind(VLM, params, reduce={"vision": "hiprun:keep=4"})
    with pytest.raises(ValueError, match="missing argument 'keep'"):
        vlm.bind(VLM, params, reduce={"vision": "hiprune"})
    with pytest.raises(ValueError, match="cuts a stack at several layers; bind it to 'llm'"):
        vlm.bind(VLM, params, reduce={"project": token_methods.aim()})
    with pytest.raises(ValueError, match=r"tokens: expected \[batch, tokens\]"):
        vlm.forward(vlm.bind(VLM, params, cache=cache.full()), images(), prompts()[0])
