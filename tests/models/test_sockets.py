"""Sockets bound to whole models: gathering is masking, evidence is the map, every policy and plan decodes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from jaxattn import cache, linear, registry, sparse, steering
from jaxattn import tokens as token_methods
from jaxattn.core.types import Need, contract
from models import by_layer, dense, llm, stack, vit, vlm
from models.bind import Bound, subset
from models.caches import MAX_CACHES
from tests.models import reference
from tests.models.small import (
    LENGTHS,
    LLM,
    TOWER,
    VLM,
    close,
    images,
    llm_params,
    look,
    prompts,
    read,
    rollout,
    vlm_params,
)  # fmt: skip

STEPS = 5
LAYERS = LLM.layers


def drops(mode, **where):
    """Reductions at the sites given, {site: rows kept}; masked rows stay in place, kept ones are gathered."""
    return {site.replace("_", "."): token_methods.uniform(keep, mode=mode) for site, keep in where.items()}


def generate(bound, **more):
    return np.asarray(models.generate(bound, prompts(), image=images(), lengths=LENGTHS, steps=STEPS, **more))


# --------------------------------------------------------------------------------------------------------- reductions


@pytest.mark.parametrize(
    "where",
    [
        {"vision_1": 8},
        {"project": 8},
        {"llm_3": 8},
        # six segments with caches of their own: more than a model keeps apart
        {"vision": 12, "llm_1": 10, "llm_2": 8, "llm_3": 6, "llm_4": 4, "llm_5": 1},
    ],
    ids=lambda where: "+".join(where),
)
def test_gathered_rows_are_masked_rows(where):
    """The reference drops by masking and keeps no cache; the model gathers, and decodes from caches of several lengths."""
    gathered = vlm.bind(VLM, vlm_params(), cache=cache.full(), reduce=drops("keep", **where))
    masked = vlm.bind(VLM, vlm_params(), reduce=drops("mask", **where))
    first = np.asarray(look(*masked, images(), prompts()))
    close(look(*gathered, images(), prompts()), first, atol=2e-3)
    whole = np.asarray(look(*vlm.bind(VLM, vlm_params()), images(), prompts()))
    assert np.abs(first - whole).max() > 1e-2, "dropping tokens must matter"
    expected = rollout(lambda x: look(*masked, images(), x), prompts(), LENGTHS, STEPS)
    np.testing.assert_array_equal(generate(gathered), expected)


def test_caches_are_as_short_as_their_rows():
    def caches(**where):
        bound = vlm.bind(VLM, vlm_params(), cache=cache.full(), reduce=drops("keep", **where))
        start = functools.partial(models.generate.__globals__["prefill"], max_new=STEPS)
        state = jax.eval_shape(lambda p, x, t: start(Bound(bound.program, bound.arrays, p), t, image=x)[1],
                               bound.params, images(), jnp.asarray(prompts()))  # fmt: skip
        return [(c.start, c.stop, c.state.layer.width) for c in state.caches]

    text = 9 + STEPS
    assert caches() == [(0, 6, 16 + text)]
    assert caches(llm_3=8) == [(0, 3, 16 + text), (3, 6, 8 + text)]
    many = caches(llm_1=12, llm_2=8, llm_3=4, llm_4=2, llm_5=1)
    assert len(many) == MAX_CACHES and [a for a, _, _ in many] == [0] + [b for _, b, _ in many[:-1]]
    assert many[-1][1] == 6 and many[0][2] == 16 + text


def test_a_budget_of_everything_changes_nothing():
    whole = look(*vlm.bind(VLM, vlm_params()), images(), prompts())
    for site in ("project", "llm_3"):
        close(look(*vlm.bind(VLM, vlm_params(), reduce=drops("keep", **{site: 16})), images(), prompts()), whole, atol=2e-3)


# -------------------------------------------------------------------------------------------------------------- plans


PLANS = {
    "lightning": by_layer((dense(), linear.lightning_attention(norm="srms", gate=None)), (0, 1, 1, 0, 1, 0)),
    "flexprefill": by_layer((dense(), sparse.flexprefill(block=4, gamma=0.6, min_budget=4)), (0, 1, 0, 1, 0, 1)),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_of_two_attentions_trains_prefills_and_decodes(name):
    plan = PLANS[name]
    bound = llm.bind(LLM, llm_params(), attention=plan, cache=cache.full())
    whole = np.asarray(read(*bound, prompts()))
    close(read(*bound, prompts(), phase="prefill"), whole, atol=2e-3)
    assert np.abs(whole - np.asarray(read(*llm.bind(LLM, llm_params()), prompts()))).max() > 1e-2

    grads = jax.jit(jax.grad(lambda p: llm.forward(Bound(bound.program, bound.arrays, p), prompts()).logits[..., 0].mean()))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads(llm_params())))
    found = np.asarray(models.generate(bound, prompts(), lengths=LENGTHS, steps=STEPS))
    if name == "lightning":  # the same layers at prefill and at decoding: whole passes say the same
        expected = rollout(lambda x: read(*bound, x), prompts(), LENGTHS, STEPS)
        np.testing.assert_array_equal(found, expected)

    traces = read._cache_size()
    other = llm.bind(LLM, llm_params(), attention=by_layer(plan.kinds, (0,) * LAYERS), cache=cache.full())
    close(read(*other, prompts()), read(*llm.bind(LLM, llm_params()), prompts()), atol=2e-3)
    assert read._cache_size() <= traces + 1, "another order of the same kinds compiles nothing but the dense model"


# ----------------------------------------------------------------------------------------------------------- evidence


@contract
class Witness:
    """Steering that asks for evidence and changes nothing."""

    asked: tuple

    def needs(self):
        return self.asked


def test_evidence_is_the_explicit_map():
    site, at = "vision.1", 1
    asked = (
        Need("cls", rows="cls", at=site), Need("all", rows="all", at=site, over_heads=None),
        Need("sum", rows="vision", at=site, total=True, over_heads="max"), Need("rows", what="rows", rows="cls", at=site),
        Need("hidden", what="hidden", at="vision.-1"), Need("entropy", what="entropy", at=site, over_heads=None),
    )  # fmt: skip
    params = vit_params()
    bound = vit.bind(TOWER, params, steering=Witness(asked))

    @jax.jit
    def see(params, image):
        streams = vit.embed(params, TOWER, image)
        return stack.run(params, bound.program.stack("vision"), subset(bound.arrays, "vision"), streams, phase="train").evidence

    found = see(params, images())
    _, maps, entered = reference.tower(params, TOWER, images())
    a, special = maps[at], TOWER.special  # [B, H, N, N]
    close(found["cls"], a[:, :, 0].mean(1))
    close(found["all"], a.mean(2))
    close(found["sum"], a[:, :, special:].sum(2).max(1), atol=2e-3)
    close(np.asarray(found["rows"])[:, 0], a[:, :, 0].mean(1))
    close(found["hidden"], entered[2], atol=2e-3)
    close(found["entropy"], -(a * np.log(a)).sum(-1), atol=2e-3)


@functools.cache
def vit_params():
    return jax.tree.map(lambda x: 2 * x if x.ndim > 1 else x, vit.init(TOWER, 3))


# -------------------------------------------------------------------------------------------------------------- caches

EVERYTHING = {
    "full": {},
    "streamingllm": {"start": 2, "recent": 64},
    "h2o": {"budget": 32, "recent": 32},
    "h2o_mask": {"budget": 32, "recent": 32},
    "tidaldecode": {"budget": 64, "select": (1, 3)},
    "duoattention": {"gates": np.tile([0.9, 0.1], (LAYERS, 1)), "sink": 8, "recent": 64},
}
FEW = {
    "full": {},
    "streamingllm": {"start": 2, "recent": 3},
    "h2o": {"budget": 2, "recent": 3},
    "h2o_mask": {"budget": 2, "recent": 3},
    "tidaldecode": {"budget": 3, "select": (1, 3)},
    "duoattention": {"gates": np.tile([0.9, 0.1], (LAYERS, 1)), "sink": 1, "recent": 3},
}


def test_every_policy_is_in_the_tables():
    assert set(registry.names("cache")) == set(EVERYTHING) == set(FEW), "a new policy belongs into both tables"


@functools.cache
def full_generation():
    return np.asarray(models.generate(llm.bind(LLM, llm_params(), cache=cache.full()), prompts(), lengths=LENGTHS, steps=STEPS))


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_policy_in_the_whole_model(name):
    make = registry.get("cache", name)
    bound = llm.bind(LLM, llm_params(), cache=make(**EVERYTHING[name]))
    found = models.generate(bound, prompts(), lengths=LENGTHS, steps=STEPS)
    np.testing.assert_array_equal(found, full_generation())

    few = llm.bind(LLM, llm_params(), cache=make(**FEW[name]))
    prefill, decode = (models.generate.__globals__[x] for x in ("prefill", "decode"))
    state = prefill(few, jnp.asarray(prompts()), lengths=LENGTHS, max_new=STEPS)[1]
    step = jax.jit(lambda arrays, state: decode(Bound(few.program, arrays, few.params), state))
    for _ in range(STEPS - 1):
        logits, state = step(few.arrays, state)
        assert np.isfinite(np.asarray(logits)).all()
    if name not in ("full", "h2o_mask", "tidaldecode", "duoattention"):
        held = int(np.asarray(state.caches[0].state.layer.meta.valid).sum(-1).max())
        assert held <= sum(x for x in FEW[name].values() if isinstance(x, int)), "rows leave"


# ------------------------------------------------------------------------------------------------------------ steering


def test_steering_through_generation():
    plain = generate(vlm.bind(VLM, vlm_params(), cache=cache.full()))
    nothing = (steering.vhr(1.0, layers=None), steering.var((0,), rho=2.0), steering.zerotuning(1.0))
    strong = (steering.vhr(6.0, layers=None), steering.var((0, 1), tau=0.1, rho=0.0, keep=0.1), steering.zerotuning(1e-4))
    for off, on in zip(nothing, strong, strict=True):
        np.testing.assert_array_equal(generate(vlm.bind(VLM, vlm_params(), cache=cache.full(), steering=off)), plain)
        tuned = generate(vlm.bind(VLM, vlm_params(), cache=cache.full(), steering=on))
        assert tuned.shape == plain.shape
    with pytest.raises(ValueError, match="steering"):
        models.generate(llm.bind(LLM, llm_params(), cache=cache.full(), steering=nothing[0]), prompts(), steps=2)


def test_models_under_vmap():
    bound = llm.bind(LLM, llm_params(), attention=PLANS["flexprefill"])
    tokens = np.stack([prompts(), prompts()[::-1]])
    both = jax.jit(jax.vmap(lambda t: llm.forward(bound, t).logits))(tokens)
    close(both[1], read(*bound, tokens[1]), atol=2e-3)
