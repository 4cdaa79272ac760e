"""What token reduction is for, beside speed ("Token Reduction Should Go Beyond Efficiency in Generative Models -- From Vision,
Language to Multimodality"): what the paper argues for, measured on synthetic images at equal numbers of rows read.

Alignment with a redundant image, answers about absent objects, memory of an early fact (``token_reduction_purposes``), and
steadiness of training (``steadiness``). Every reducer runs through the same interface, as a TokenTransform; ``oracle`` knows
where the answer is. The survey's axes: ``analysis.taxonomy``. `python -m benchmarks.experiments.token_reduction_purposes`
prints both.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.analysis.taxonomy import ATTENTION
from jaxattn.core.reduce import choose, count_of, dispose, rows_left, valid_rows
from jaxattn.core.types import Ctx, Meta, Spec, State, Tokens, contract, expect, operand, split


# ------------------------------------------------------------------------------------------------------- synthetic images
@dataclasses.dataclass(frozen=True)
class Images:
    """Redundant images and their reader.

    Each of ``tokens`` rows is a key of ``width`` numbers and a content: one row, the needle, answers the question; ``objects``
    patterns fill the rest in noisy copies. The reader is one softmax over all rows, so what is repeated outvotes what is
    right: the needle's logit exceeds theirs by ``margin`` only. Contents are ``classes`` one-hot vectors; a share ``junk`` of
    the copies shows what is not in the image.
    """

    tokens: int = 64
    objects: int = 4
    classes: int = 12
    width: int = 8
    margin: float = 3.0
    noise: float = 0.5
    junk: float = 0.3


IMAGES = Images()


@functools.partial(jax.jit, static_argnums=(0, 1))
def draw(c: Images, count: int, key) -> dict:
    """x [S, N, width + classes], needle int32 [S] (its place), answer int32 [S], present bool [S, classes]."""
    keys = jax.random.split(key, 6)
    order = jnp.argsort(jax.random.uniform(keys[0], (count, c.classes)), axis=-1)
    answer, seen = order[:, 0], order[:, 1 : 1 + c.objects]
    copy = jax.random.randint(keys[1], (count, c.tokens), 0, c.objects)
    shown = jnp.take_along_axis(seen, copy, 1)
    absent = jax.random.uniform(keys[2], (count, c.tokens)) < c.junk
    other = jnp.take_along_axis(order, jax.random.randint(keys[3], (count, c.tokens), 1 + c.objects, c.classes), 1)
    shown = jnp.where(absent, other, shown)
    needle = jax.random.randint(keys[4], (count,), 0, c.tokens)
    at = jnp.arange(c.tokens) == needle[:, None]
    shown = jnp.where(at, answer[:, None], shown)
    key_rows = c.noise * jax.random.normal(keys[5], (count, c.tokens, c.width))
    key_rows = key_rows.at[..., 0].add(c.margin * at)
    x = jnp.concatenate([key_rows, jax.nn.one_hot(shown, c.classes)], -1)
    present = jax.nn.one_hot(jnp.concatenate([answer[:, None], seen], 1), c.classes).max(1) > 0
    return {"x": x, "needle": needle, "answer": answer, "present": present}


def look(x, valid, query):
    """(read [S, classes], probabilities [S, N]) of rows x [S, N, width + classes] by a query [width]."""
    width = query.shape[-1]
    logits = jnp.where(valid, x[..., :width] @ query, -jnp.inf)
    p = jax.nn.softmax(logits, -1)
    return jnp.einsum("sn,snc->sc", p, x[..., width:]), p


@contract
class _Oracle:
    keep: int = operand("budget")

    def rows(self, n):
        return rows_left(self.keep, n, "keep")

    def apply(self, params, state, tokens, evidence, ctx):
        n = tokens.x.shape[1]
        keep = choose(evidence["needle"], count_of(params, n), valid_rows(tokens))
        return dispose(tokens, keep, self.rows(n)), state, {}


def oracle(keep: int):
    """The reducer that knows where the answer is: the needle, then rows from the first on."""
    return _Oracle(keep)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _reduced(program, needs, params, batch, key):
    """(rows, valid) that a reducer leaves of a batch: every reducer runs through here."""
    x = batch["x"]
    query = jnp.eye(x.shape[-1])[0, : batch["width"].shape[0]]
    p = look(x, jnp.ones(x.shape[:2], bool), query)[1]
    evidence = {name: p for name in needs} | {"needle": (jnp.arange(x.shape[1]) == batch["needle"][:, None]).astype(x.dtype)}
    tokens = Tokens(x, Meta.of(x.shape[1]))
    out = program.apply(params, State(), tokens, evidence, Ctx(key=key, phase="prefill", site="project"))[0]
    return out.x, jnp.broadcast_to(out.meta.valid, out.x.shape[:2])


def _asks(record) -> tuple:
    """The needs of a method that can run here."""
    wants = tuple(record.needs()) if hasattr(record, "needs") else ()
    whats = {n.what for n in wants} - set(ATTENTION[:3])
    expect("methods", sorted(whats), "methods that ask for attention per token, or for nothing", not whats)
    return wants


def reduce_batch(record, batch: dict, key) -> tuple:
    """(rows [S, K, C], valid [S, K]) that ``record`` (None: nothing) leaves. A record may ask for attention per token."""
    if record is None:
        return batch["x"], jnp.ones(batch["x"].shape[:2], bool)
    wants = _asks(record)
    program, params = split(record, Spec(layers=1, dim=batch["x"].shape[-1]))
    if hasattr(record, "init"):
        params |= record.init(jax.random.key(0), Spec(layers=1, dim=batch["x"].shape[-1]))
    return _reduced(program, tuple(n.name for n in wants), params, batch, key)


# --------------------------------------------------------------------------------------------------------------- probes
@dataclasses.dataclass(frozen=True)
class Point:
    """A method at a keep ratio. rows: that are read (what it costs).  accuracy, error: share of right answers and its
    standard error.  absent: probability of answers that are not in the image.  recall: share of early facts found again
    behind as much image as ``padding`` times these tokens."""

    method: str
    ratio: float
    rows: int
    accuracy: float
    error: float
    absent: float
    recall: float


def non_monotone(ratios: Sequence[float], values: Sequence[float], errors: Sequence[float], *, deviations: float = 2.0):
    """The keep ratio below 1 that beats keeping everything by more than ``deviations`` standard errors of the difference
    (the best such one), or None where the curve has no such optimum. ratios must hold 1."""
    table = dict(zip(ratios, zip(values, errors, strict=True), strict=True))
    expect("ratios", tuple(ratios), "distinct ones, 1 among them", 1.0 in table and len(table) == len(ratios))
    whole, error = table.pop(1.0)
    better = [(v, r) for r, (v, e) in table.items() if v - whole > deviations * (e * e + error * error) ** 0.5]
    return max(better)[1] if better else None


@functools.partial(jax.jit, static_argnames=("sharpness",))
def _score(x, valid, batch, sharpness=12.0):
    """(right, mass of absent answers) [S] of what is read."""
    read, _ = look(x, valid, jnp.eye(x.shape[-1])[0, : batch["width"].shape[0]])
    read = jnp.where(valid.any(-1)[:, None], read, 0)
    p = jax.nn.softmax(sharpness * read, -1)
    return read.argmax(-1) == batch["answer"], jnp.where(batch["present"], 0, p).sum(-1)


@jax.jit
def _recalled(x, valid, batch, fact):
    """bool [S]: whether the answer comes from a fact [S, C] in front of the image rows, which have no needle."""
    rows = jnp.concatenate([fact[:, None], x], 1)
    seen = jnp.concatenate([jnp.ones_like(valid[:, :1]), valid], 1)
    return _score(rows, seen, batch)[0]


def token_reduction_purposes(methods: Mapping[str, object], ratios: Sequence[float] = (1.0, 0.5, 0.25, 0.125), *,
                             images: Images = IMAGES, count: int = 1000, padding: int = 4,
                             seed: int = 0) -> list[Point]:  # fmt: skip
    """Alignment, hallucination and coherence of reducers at equal numbers of rows ("Token Reduction Should Go Beyond
    Efficiency in Generative Models").

    Args:
      methods: {name: factory(keep) -> TokenTransform record}: ``oracle``, or any registered reducer that asks for attention
        per token or for nothing. "random" and "uniform" are the baselines to compare with.
      ratios: shares of tokens kept, 1 among them (no reduction).  count: images.  padding: see ``Point.recall``.
    """
    expect("ratios", tuple(ratios), "shares in (0, 1], 1 among them", 1.0 in ratios and all(0 < r <= 1 for r in ratios))
    for factory in methods.values():
        _asks(factory(max(1, round(min(ratios) * images.tokens))))
    key, wide = jax.random.key(seed), dataclasses.replace(images, tokens=padding * images.tokens)
    width = jnp.zeros(images.width)
    batch = draw(images, count, key) | {"width": width}
    # The fact is the needle of a short image; the long one that follows has lost its own.
    long = draw(wide, count, jax.random.fold_in(key, 1)) | {"width": width, "answer": batch["answer"]}
    fact = jnp.take_along_axis(batch["x"], batch["needle"][:, None, None], 1)[:, 0]
    blank = jnp.arange(wide.tokens) == long["needle"][:, None]
    long["x"] = jnp.where(blank[..., None], jnp.roll(long["x"], 1, axis=1), long["x"])
    found = []
    for name, factory in methods.items():
        for ratio in ratios:
            keep = max(1, round(ratio * images.tokens))
            record = None if ratio == 1 else factory(keep)
            x, valid = reduce_batch(record, batch, jax.random.fold_in(key, 2))
            right, absent = (np.asarray(a, np.float64) for a in _score(x, valid, batch))
            # As many rows of the long image as of the short one: its share is ``padding`` times smaller.
            y, live = reduce_batch(factory(keep) if ratio < 1 else None, long, jax.random.fold_in(key, 3))
            recall = float(np.mean(_recalled(y, live, long, fact)))
            accuracy = float(right.mean())
            error = float(np.sqrt(accuracy * (1 - accuracy) / count))
            found.append(Point(name, float(ratio), keep, accuracy, error, float(absent.mean()), recall))
    return found


@dataclasses.dataclass(frozen=True)
class Steadiness:
    """Training with a reducer: the final loss, and the deviation of loss and gradient norm from step to step."""

    method: str
    ratio: float
    loss: float
    loss_deviation: float
    gradient_deviation: float


def steadiness(methods: Mapping[str, object], ratio: float = 0.25, *, images: Images = IMAGES, steps: int = 200,
               batch: int = 32, rate: float = 0.3, seed: int = 0) -> list[Steadiness]:  # fmt: skip
    """How steadily a reader's query is learnt (gradient descent on the cross-entropy of its answers) from reduced images,
    another draw each step; the deviations are over the last half of the steps. None as a factory reads everything."""
    found = []
    for name, factory in methods.items():
        record = None if factory is None else factory(max(1, round(ratio * images.tokens)))
        xs, valids, answers = [], [], []
        for step in range(0, steps * batch, steps * batch // 4):  # a few large draws, cut into steps
            key = jax.random.fold_in(jax.random.key(seed), step)
            drawn = draw(images, steps * batch // 4, key) | {"width": jnp.zeros(images.width)}
            x, valid = reduce_batch(record, drawn, jax.random.fold_in(key, 1))
            xs, valids, answers = [*xs, x], [*valids, valid], [*answers, drawn["answer"]]
        cut = lambda parts: jnp.concatenate(parts).reshape(steps, batch, *parts[0].shape[1:])  # noqa: E731
        losses, norms = _learn(cut(xs), cut(valids), cut(answers), images.width, rate)
        half = steps // 2
        found.append(Steadiness(name, 1.0 if factory is None else ratio, float(losses[half:].mean()),
                                float(losses[half:].std()), float(norms[half:].std())))  # fmt: skip
    return found


@functools.partial(jax.jit, static_argnums=3)
def _learn(x, valid, answer, width, rate):
    def loss(query, x, valid, answer):
        read = jnp.where(valid.any(-1)[:, None], look(x, valid, query)[0], 0)
        logp = jax.nn.log_softmax(8.0 * read)
        return -jnp.take_along_axis(logp, answer[:, None], -1).mean()

    def step(query, seen):
        value, gradient = jax.value_and_grad(loss)(query, *seen)
        return query - rate * gradient, (value, jnp.linalg.norm(gradient))

    return jax.lax.scan(step, jnp.zeros(width), (x, valid, answer))[1]


__all__ = ["IMAGES", "Images", "Point", "Steadiness", "draw", "look", "non_monotone", "oracle", "reduce_batch", "steadiness",
           "token_reduction_purposes"]  # fmt: skip
