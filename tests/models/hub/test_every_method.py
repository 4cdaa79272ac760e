"""Registered methods by their names on a LLaVA that was loaded from disk, prompts with a picture inside: together, with a
budget of everything, they give the plain model's logits; every one of them, by its example, fits the model."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from jaxattn import cache, registry
from models import hub, llm, vit, vlm
from models.bind import Bound
from tests.test_records import ALONE, IN_TOWER, build, site_of

generation = importlib.import_module("models.generate")
LAYERS = 6
TOWER = vit.config(12, 3, LAYERS, 16, 2, activation="quick_gelu", stem_bias=False, pre_norm=True, special_positions=1, eps=1e-5)
CONFIG = vlm.VLMConfig(TOWER, llm.tiny(vocab=40, layers=LAYERS, dim=16, hidden=32), 16)
RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(2, 12, 12, 3)).astype(np.float32)
WORDS, LENGTHS, AT = RNG.integers(0, 40, (2, 9)).astype(np.int32), np.array([9, 6], np.int32), np.array([3, 1], np.int32)
WHOLE = {  # budgets of everything; a few programs for many methods
    "hiprune, fastv, streamingllm, zerotuning": dict(
        reduce={"vision": "hiprune:keep=16", "project": "uniform:keep=16", "llm.2": "fastv:keep=16"},
        cache="streamingllm:start=4,recent=64", steering=("zerotuning:gamma=1.0", "var:dims=(0,),rho=2.0")),
    "fastervlm, mmtok, visiondrop, h2o, vhr": dict(
        reduce={"vision": "fastervlm:keep=16", "project": "mmtok:keep=16",
                "llm": "visiondrop_stages:keep=((16,0),),layers=(2,),positions=original"},
        cache="h2o:budget=64,recent=64", steering="vhr:alpha=1.0,layers=none"),
    "vtc_cls, zoo_prune, flowcut_text, tidaldecode, flexprefill": dict(
        reduce={"vision": "vtc_cls:keep=16", "project": "zoo_prune:keep=16", "llm.2": "flowcut_text:keep=16"},
        cache="tidaldecode:budget=64,select=(1,3)", attention="flexprefill:block=4,gamma=1.0,min_budget=64"),
}  # fmt: skip
SOCKETS = ("tokens", "cache", "steering", "attention")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    fresh = models.build(CONFIG, seed=1)
    sharp = jax.tree.map(lambda x: 2 * x if x.ndim > 1 else x, fresh.params)
    models.save_pretrained(fresh._replace(params=sharp), folder)
    bound, _ = hub.from_pretrained(folder, cache=cache.full())
    assert bound.program.config == CONFIG
    return bound


@functools.partial(jax.jit, static_argnums=0)
def say(program, arrays, params):
    """Logits [2, B, V] behind the prompt and behind one more token."""
    bound = Bound(program, arrays, params)
    first, state = generation.prefill(bound, WORDS, image=IMAGE, image_at=AT, lengths=LENGTHS, max_new=2)
    return jnp.stack([first, generation.decode(bound, state)[0]])


def logits(bound):
    """Of programs that run once: half of the time would go into optimising them."""
    fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    args = bound.arrays, bound.params
    return np.asarray(say.lower(bound.program, *args).compile(compiler_options=fast)(*args))


@pytest.fixture(scope="module")
def plain(loaded):
    return logits(loaded)


@pytest.mark.parametrize("together", WHOLE)
def test_budgets_of_everything_change_nothing(together, loaded, plain):
    np.testing.assert_allclose(logits(models.bind(loaded, **WHOLE[together])), plain, atol=2e-4)


def test_small_budgets_do(loaded, plain):
    """Tower evidence, a drop inside the language model, a short cache and steering: less to read, another answer."""
    model = models.bind(loaded, reduce={"vision": "hiprune:keep=8", "llm": "visiondrop_stages:keep=((3,1),),layers=(2,)"},
                        cache="streamingllm:start=2,recent=6", steering="zerotuning:gamma=3.0")  # fmt: skip
    found = logits(model)
    assert np.isfinite(found).all() and np.abs(found - plain).max() > 1e-2


@pytest.mark.parametrize("socket", SOCKETS)
def test_every_name_fits(socket, loaded):
    """Traced: shapes, evidence and arguments of every example."""
    for name in set(registry.names(socket)) - IN_TOWER - ALONE:
        record = build(socket, name)
        place = {socket: record} if socket != "tokens" else {"reduce": {site_of(record): record}}
        model = models.bind(loaded, **{"cache": "full", **place})
        out = jax.eval_shape(functools.partial(say, model.program), model.arrays, model.params)
        assert out.shape == (2, 2, CONFIG.llm.vocab), name
