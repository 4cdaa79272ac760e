"""Small models that the tests of this folder share: same shapes, so the same compiled functions."""

from __future__ import annotations

import functools
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np

from models import llm, vit, vlm
from models.bind import Bound

LLM = llm.tiny(vocab=40, layers=6, dim=16, heads=4, kv_heads=2, hidden=32)
TOWER = vit.config(12, 3, 3, 16, 2, channels=2, hidden=32, registers=1)
VLM = vlm.VLMConfig(TOWER, LLM, projector_hidden=32, position=True)
LENGTHS = np.array([9, 5], np.int32)
# XLA's own emitters of loops, which the suite goes without (``tests/conftest.py``), for what must agree to the last bits.
SHIPPED = {"xla_cpu_use_fusion_emitters": True} if version("jaxlib").startswith("0.10.") else {}


def sharpen(params: dict, factor: float = 3.0) -> dict:
    """Weights whose attention and next token are far from uniform, so that mistakes show."""
    return jax.tree.map(lambda x: x * factor if x.ndim > 1 else x, params)


def quick(f, **options):
    """``jax.jit`` of a program that runs a few times: half of the time would go into optimising it."""
    cheap = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(f, compiler_options=cheap, **options)


@functools.cache
def llm_params():
    return sharpen(llm.init(LLM, 1))


@functools.cache
def vlm_params():
    return sharpen(vlm.init(VLM, 1), 2.0)


def prompts(vocab: int = 40, n: int = 9) -> np.ndarray:
    """int32 [2, n]; what stands behind a row's length is arbitrary."""
    return np.random.default_rng(0).integers(0, vocab, (2, n)).astype(np.int32)


def images() -> np.ndarray:
    return np.random.default_rng(1).random((2, 12, 12, 2)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("phase",))
def read(program, arrays, params, tokens, meta=None, phase="train", dtype=None):
    """Logits [B, N, V] of a language model."""
    return llm.forward(Bound(program, arrays, params), tokens, meta=meta, phase=phase).logits


@functools.partial(jax.jit, static_argnums=0)
def look(program, arrays, params, image, tokens, meta=None):
    """Logits [B, T, V] of a vision-language model's text rows."""
    return vlm.forward(Bound(program, arrays, params), image, tokens, meta=meta)[0].logits


def rollout(forward, tokens, lengths, steps: int) -> np.ndarray:
    """Greedy continuation [B, steps] by whole passes over one padded array: no cache, no masks but causality."""
    text = np.zeros((len(tokens), tokens.shape[1] + steps), np.int32)
    for row, n in enumerate(lengths):
        text[row, :n] = tokens[row, :n]
    at, found = np.array(lengths), []
    for _ in range(steps):
        logits = np.asarray(forward(jnp.asarray(text)))
        new = logits[np.arange(len(text)), at - 1].argmax(-1)
        text[np.arange(len(text)), at] = new
        at = at + 1
        found.append(new)
    return np.stack(found, 1)


def close(a, b, atol=2e-4):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol)
