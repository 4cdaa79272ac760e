"""Exits split on the host: the same answers as masks in one program, with neither rows nor caches of what left."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import cache, tokens
from models import llm, vit, vlm
from models.generate.exits import prefill_exits
from tests.models.small import quick

generation = importlib.import_module("models.generate")
CONFIG = vlm.VLMConfig(vit.config(12, 4, 2, 8, 2, hidden=8), llm.tiny(vocab=24, layers=4, dim=16, hidden=16), 16)
RNG = np.random.default_rng(0)
IMAGE = RNG.uniform(size=(1, 12, 12, 3)).astype(np.float32)
TEXT = RNG.integers(1, 24, (1, 5)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: 2 * x, vlm.init(CONFIG))


def margins(bound, values):
    """The bound model with routers that exit where told: -inf at once, inf never."""
    operands = bound.arrays["operands"]
    mine = {**operands["llm"], **{f"cut.{i}": {"margin": jnp.float32(v)} for i, v in enumerate(values)}}
    return bound._replace(arrays={**bound.arrays, "operands": {**operands, "llm": mine}})


@pytest.mark.parametrize(("values", "layers"), [((np.inf, -np.inf), 3), ((np.inf, np.inf), 4)])
def test_split_as_masked(params, values, layers):
    bound = vlm.bind(CONFIG, params, reduce={"llm": tokens.dyvte((0, 2), hidden=8)}, cache=cache.full())
    bound = margins(bound, values)
    logits, state, read = prefill_exits(bound, TEXT, image=IMAGE, image_at=2, max_new=2)
    assert read == layers
    ask = dict(image=IMAGE, image_at=2, max_new=2)
    whole, masked = quick(lambda arrays: generation.prefill(bound._replace(arrays=arrays), TEXT, **ask))(bound.arrays)
    np.testing.assert_allclose(logits, whole, atol=1e-5)
    step = quick(lambda arrays, state: generation.decode(bound._replace(arrays=arrays), state)[0])
    np.testing.assert_allclose(step(bound.arrays, state), step(bound.arrays, masked), atol=1e-5)
    # Layers behind the exit keep the prompt and what is to come, and no image.
    rows = {i: stack.state.layer.meta.valid.shape[-1] for stack in state.caches for i in range(stack.start, stack.stop)}
    assert rows == {i: (9 if i < layers else 0) + 5 + 2 for i in range(4)}


def test_what_is_refused(params):
    with pytest.raises(ValueError, match="reduce: expected a method at 'llm'"):
        prefill_exits(vlm.bind(CONFIG, params, cache=cache.full()), TEXT, image=IMAGE, max_new=1)
