"""Text dominance: the identities of the definition, and the figures of a bound model against its maps."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import tokens
from jaxattn.analysis.text_dominance import dominance, layer_groups, text_dominance
from models.language import llm
from models.multimodal import vlm
from models.vision import vit

RNG = np.random.default_rng(0)
S = 24
TEXT, OTHER = np.arange(S) >= 16, (np.arange(S) >= 2) & (np.arange(S) < 16)  # two system tokens in neither


def test_definition():
    found = dominance(np.full((3, S), 1 / S, np.float32), TEXT, OTHER)
    for value in found.values():
        np.testing.assert_allclose(value, 1, rtol=1e-6)
    a = RNG.exponential(size=(2, 5, S)).astype(np.float32)
    found = dominance(a, TEXT, OTHER)
    np.testing.assert_allclose(found["mdi"], (a[..., TEXT].sum(-1) / 8) / (a[..., OTHER].sum(-1) / 14), rtol=1e-5)
    np.testing.assert_allclose(found["mdi"], found["aei_text"] / found["aei_other"], rtol=1e-5)
    system = a.copy()
    system[..., :2] *= 100
    np.testing.assert_allclose(dominance(system, TEXT, OTHER)["mdi"], found["mdi"], rtol=1e-6)


def test_counts_move_it():
    a = RNG.exponential(size=(S,)).astype(np.float32)
    mdi = dominance(a, TEXT, OTHER)["mdi"]
    twice = np.concatenate([a, a[OTHER]])  # every other token again, the mass of each split between the copies
    twice[:S][OTHER] /= 2
    twice[S:] /= 2
    more = np.ones(14, bool)
    doubled = dominance(twice, np.concatenate([TEXT, ~more]), np.concatenate([OTHER, more]))["mdi"]
    np.testing.assert_allclose(doubled, 2 * mdi, rtol=1e-5)
    kept = np.flatnonzero(OTHER)[:2]  # compression to 2 of 14 tokens that keeps their mass
    few = np.where(TEXT, a, 0.0)
    few[kept] = a[OTHER].sum() / 2
    np.testing.assert_allclose(dominance(few, TEXT, np.isin(np.arange(S), kept))["mdi"], mdi * 2 / 14, rtol=1e-5)


def test_groups_of_layers():
    np.testing.assert_allclose(layer_groups(jnp.arange(7.0)), [0.5, 3.0, 5.5])
    with pytest.raises(ValueError, match="values: expected at least 3, got 2 layers"):
        layer_groups(jnp.ones(2))


def test_figures_of_a_model():
    """From a bound model's evidence, with and without FasterVLM's compression: the same as from masses per group."""
    config = vlm.VLMConfig(vit.config(24, 4, 4, 16, 2, hidden=16), llm.tiny(vocab=24, layers=3, dim=16, hidden=16), 16)
    params = vlm.init(config)
    image = RNG.uniform(size=(2, 24, 24, 3)).astype(np.float32)
    prompt = RNG.integers(1, 24, (2, 6)).astype(np.int32)
    record, found = text_dominance(3, rows=2), []
    for reduce in ({}, {"vision": tokens.fastervlm(4)}):
        out, _ = vlm.forward(vlm.bind(config, params, reduce=reduce, steering=record), image, prompt)
        a, b = out.stack.streams.span("text")
        n = out.stack.streams.x.shape[1]
        text = ((np.arange(n) >= a) & (np.arange(n) < b))[None] & np.asarray(out.stack.streams.meta.valid)
        figures = record.reduce(out.stack.evidence, text, ~text)
        assert figures["mdi"].shape == (2, 3) and figures["mdi_groups"].shape == (2, 3)
        mass = np.asarray(out.stack.evidence["text_dominance.1"])
        np.testing.assert_allclose(mass.sum(-1), 2 * config.llm.block.heads, rtol=1e-4)  # of two rows
        want = mass[:, a:b].mean(-1) / mass[:, :a].mean(-1)
        np.testing.assert_allclose(figures["mdi"][:, 1], want, rtol=1e-5)
        found.append(np.asarray(figures["mdi"]))
    # With fresh weights attention is close to even, so that MDI is near 1 however many tokens there are.
    assert all(np.abs(np.log(x)).max() < 0.5 for x in found) and not np.allclose(*found)
