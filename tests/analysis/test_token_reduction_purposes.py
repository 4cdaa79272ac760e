"""The axes follow from what records declare; the probes tell an oracle from chance."""

import dataclasses
import importlib

import jax
import numpy as np
import pytest

from jaxattn import registry, tokens
from jaxattn.core.types import Ctx, Meta, State, Tokens, split
from tests.test_records import build

purposes = importlib.import_module("jaxattn.analysis.token_reduction_purposes")
axes = importlib.import_module("jaxattn.analysis.taxonomy")
RATIOS = (1.0, 0.25, 0.125)
IMAGES = purposes.Images()


@pytest.fixture(scope="module")
def places():
    return {name: axes.classify(name, build("tokens", name), layers=6) for name in registry.names("tokens")}


def test_every_registered_reducer_has_a_place(places):
    words = {
        "stage": {"in-encoder", "pre-LLM", "in-LLM"},
        "operation": {"select", "merge", "pool", "select + merge", "select + resample", "exit", "mark"},
        "granularity": {"token", "token per crop", "token per layer", "image"},
        "training": {"training-free", "calibrated", "trained"},
        "budget": {"fixed", "adaptive"},
    }
    for place in places.values():
        for axis, known in words.items():
            assert getattr(place, axis) in known, place
        assert set(place.signal.split(", ")) <= {"attention", "similarity", "gradient", "activations", "text", "learned",
                                                 "random", "position"}, place  # fmt: skip
    rows = axes.taxonomy({name: build("tokens", name) for name in ("fastv", "hiprune", "aim_merge")})
    assert [r.stage for r in rows] == sorted((r.stage for r in rows), key=["in-encoder", "pre-LLM", "in-LLM"].index)
    assert axes.markdown(rows).count("\n") == 5 and "| hiprune | pre-LLM | select |" in axes.markdown(rows)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("fastv", ("in-LLM", "select", "attention", "token", "training-free", "fixed")),
        ("fastervlm", ("pre-LLM", "select", "attention", "token per crop", "training-free", "fixed")),
        ("aim_merge", ("pre-LLM", "merge", "similarity", "token", "training-free", "fixed")),
        ("mean_pool", ("pre-LLM", "pool", "position", "token", "training-free", "fixed")),
        ("random", ("pre-LLM", "select", "random", "token", "training-free", "fixed")),
        ("todre_exit", ("in-LLM", "exit", "attention", "image", "training-free", "adaptive")),
        ("dyvte", ("in-LLM", "exit", "activations, learned", "image", "trained", "adaptive")),
        ("textmonkey", ("pre-LLM", "select + resample", "similarity, learned", "token", "trained", "fixed")),
        ("mustdrop_merge", ("in-encoder", "merge", "similarity", "token", "training-free", "adaptive")),
    ],
)
def test_places_that_papers_name(places, name, place):
    assert dataclasses.astuple(places[name])[1:] == place


@pytest.fixture(scope="module")
def points():
    methods = {"oracle": purposes.oracle, "random": tokens.random, "uniform": tokens.uniform, "fastervlm": tokens.fastervlm}
    return purposes.token_reduction_purposes(methods, RATIOS, count=600, padding=2)


def curve(points, method, what="accuracy"):
    return [getattr(p, what) for p in points if p.method == method]


def test_an_oracle_beats_no_reduction_and_chance_does_not(points):
    """Attention dilutes over copies: who keeps the needle answers better than who reads everything."""
    for p in points:
        assert p.rows == round(p.ratio * IMAGES.tokens)
    best = {m: purposes.non_monotone(RATIOS, curve(points, m), curve(points, m, "error"))
            for m in ("oracle", "random", "uniform", "fastervlm")}  # fmt: skip
    assert best["oracle"] == 0.125 and best["fastervlm"] is not None
    assert best["random"] is None and best["uniform"] is None
    whole, quarter, _ = curve(points, "oracle")
    assert quarter > whole + 0.1 and curve(points, "random")[1] < whole - 0.1
    absent, recall = curve(points, "oracle", "absent"), curve(points, "random", "recall")
    assert absent[2] < absent[1] < absent[0]
    assert recall[2] > recall[1] > recall[0], "a fact in front of the image is found again behind less of it"


def test_reading_by_hand():
    c = dataclasses.replace(IMAGES, tokens=5, junk=0.0)
    batch = purposes.draw(c, 3, jax.random.key(0))
    x, needle = np.asarray(batch["x"]), np.asarray(batch["needle"])
    for s in range(3):
        content = x[s, :, c.width :]
        assert content[needle[s]].argmax() == batch["answer"][s] and (content.sum(-1) == 1).all()
        assert (content.argmax(-1) == int(batch["answer"][s])).sum() == 1, "one row answers"
        assert np.asarray(batch["present"])[s, content.argmax(-1)].all()
    valid = np.array([[True] * 4 + [False]] * 3)
    read, p = jax.jit(purposes.look)(batch["x"], valid, np.eye(c.width, dtype=np.float32)[0])
    w = np.exp(x[..., 0]) * valid
    w /= w.sum(-1, keepdims=True)
    np.testing.assert_allclose(p, w, atol=1e-6)
    np.testing.assert_allclose(read, np.einsum("sn,snc->sc", w, x[..., c.width :]), atol=1e-6)


def test_curves():
    ratios, small = (1.0, 0.5, 0.25), (0.01,) * 3
    assert purposes.non_monotone(ratios, (0.7, 0.9, 0.8), small) == 0.5
    assert purposes.non_monotone(ratios, (0.7, 0.71, 0.6), small) is None  # within the error
    assert purposes.non_monotone(ratios, (0.9, 0.8, 0.7), small) is None
    with pytest.raises(ValueError, match="ratios: expected distinct ones, 1 among them"):
        purposes.non_monotone((0.5, 0.25), (0.1, 0.2), (0.1, 0.1))


def test_training_is_steadier_with_what_matters():
    found = {r.method: r for r in purposes.steadiness({"random": tokens.random, "oracle": purposes.oracle}, steps=100)}
    assert found["oracle"].loss < found["random"].loss
    assert found["oracle"].loss_deviation < found["random"].loss_deviation
    assert all(np.isfinite(dataclasses.astuple(r)[1:]).all() for r in found.values())


def test_one_interface():
    """The oracle is a TokenTransform like any other; a method that needs a model's insides says so."""
    program, params = split(purposes.oracle(2))
    rows, needle = Tokens(np.eye(4, dtype=np.float32)[None], Meta.of(4)), np.array([[0.0, 0, 1, 0]], np.float32)
    pos = jax.jit(lambda p: program.apply(p, State(), rows, {"needle": needle}, Ctx())[0].meta.pos)(params)
    np.testing.assert_array_equal(pos, [[0, 2]])
    with pytest.raises(ValueError, match="methods: expected methods that ask for attention per token"):
        purposes.token_reduction_purposes({"mmtok": tokens.mmtok}, (1.0, 0.5), count=8)
