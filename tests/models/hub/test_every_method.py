"""Every registered method by its name on a LLaVA that was loaded from disk: prompts with a picture inside and, but for token
methods, a decoded token. With a budget of everything the logits are the plain model's; methods without one run their
example."""

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
LAYERS, PATCHES = 6, 16
TOWER = vit.config(12, 3, LAYERS, 16, 2, activation="quick_gelu", stem_bias=False, pre_norm=True, special_positions=1, eps=1e-5)
CONFIG = vlm.VLMConfig(TOWER, llm.tiny(vocab=40, layers=LAYERS, dim=16, hidden=32), 16)
RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(2, 12, 12, 3)).astype(np.float32)
WORDS, LENGTHS, AT = RNG.integers(0, 40, (2, 9)).astype(np.int32), np.array([9, 6], np.int32), np.array([3, 1], np.int32)
# A budget of everything: {name: command-line form}; sites as in ``site_of``.
WHOLE = {
    "tokens": {
        "uniform": "uniform:keep=16", "random": "random:keep=16", "hiprune": "hiprune:keep=16", "fastv": "fastv:keep=16",
        "fastervlm": "fastervlm:keep=16", "holov": "holov:keep=16,crops=1", "mmtok": "mmtok:keep=16",
        "vtc_cls": "vtc_cls:keep=16", "flowcut_text": "flowcut_text:keep=16", "zoo_prune": "zoo_prune:keep=16",
        "todre_exit": "todre_exit:tau=0.0",
    },
    "cache": {
        "full": "full", "streamingllm": "streamingllm:start=4,recent=64", "h2o": "h2o:budget=64,recent=64",
        "h2o_mask": "h2o_mask:budget=64,recent=64", "tidaldecode": "tidaldecode:budget=64,select=(1,3)",
    },
    "steering": {"zerotuning": "zerotuning:gamma=1.0", "vhr": "vhr:alpha=1.0,layers=none", "var": "var:dims=(0,),rho=2.0"},
    "attention": {"flexprefill": "flexprefill:block=4,gamma=1.0,min_budget=64"},
}  # fmt: skip
SOCKETS = ("tokens", "cache", "steering", "attention")
ALL = [(socket, name) for socket in SOCKETS for name in registry.names(socket) if name not in IN_TOWER | ALONE]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    fresh = models.build(CONFIG, seed=1)
    sharp = jax.tree.map(lambda x: 2 * x if x.ndim > 1 else x, fresh.params)
    models.save_pretrained(fresh._replace(params=sharp), folder)
    bound, _ = hub.from_pretrained(folder, cache=cache.full())
    assert bound.program.config == CONFIG
    return bound


@functools.partial(jax.jit, static_argnums=(0, 1))
def say(program, decodes, arrays, params):
    """Logits [1 or 2, B, V] behind the prompt and, with ``decodes``, behind one more token."""
    bound = Bound(program, arrays, params)
    first, state = generation.prefill(bound, WORDS, image=IMAGE, image_at=AT, lengths=LENGTHS, max_new=2)
    return jnp.stack([first, generation.decode(bound, state)[0]] if decodes else [first])


# Programs that run once: half of the time would go into optimising them.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def logits(bound, decodes=True):
    args = bound.arrays, bound.params
    return np.asarray(say.lower(bound.program, decodes, *args).compile(compiler_options=FAST)(*args))


@pytest.fixture(scope="module")
def plain(loaded):
    return logits(loaded)


@pytest.mark.parametrize(("socket", "name"), ALL, ids=lambda x: x)
def test_every_method_on_a_loaded_llava(socket, name, loaded, plain):
    whole = WHOLE[socket].get(name)
    record = registry.parse(socket, whole) if whole else build(socket, name)
    place = {socket: record} if socket != "tokens" else {"reduce": {site_of(record): record}}
    found = logits(models.bind(loaded, **{"cache": "full", **place}), socket != "tokens")
    assert np.isfinite(found).all() and found.shape == plain[: len(found)].shape
    if whole:
        np.testing.assert_allclose(found, plain[: len(found)], atol=2e-4)
