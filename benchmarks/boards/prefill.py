"""Three times of a prefill on this machine, taken in turns in one run: what fewer visual tokens save, how close schedules
inside the language model come to what their token counts allow, and what choosing the tokens costs.

Random weights: times depend on shapes. Every round runs all programs once, starting at another one each time; a figure is
the median over the rounds of a ratio within a round.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.boards import budgets
from benchmarks.boards.budgets import Entry
from benchmarks.prefill import Prefill
from jaxattn.core.types import Tokens
from models.bind import Bound
from models.language import llm
from models.multimodal import vlm
from models.vision import vit

ASKED = {"saving": 3.0, "schedule": 0.9, "choosing": 0.1}


def model(o: Prefill) -> vlm.VLMConfig:
    """576 visual tokens of a tower with a class token, and the language model."""
    tower = vit.config(96, 4, o.vision_layers, o.vision_dim, max(1, o.vision_dim // 64), channels=1)
    return vlm.VLMConfig(tower, llm.config(1024, o.layers, o.dim, o.dim // 64), o.dim)


def visual_of(c: vlm.VLMConfig, x: jax.Array) -> vlm.Visual:
    """Rows [B, n, C] as the language model gets them, the first n patches of the picture."""
    n = x.shape[1]
    meta = jax.tree.map(lambda a: jnp.broadcast_to(a[:, :n], (len(x), n)), vit.patch_meta(c.vision))
    slot = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), x.shape[:2])
    return vlm.Visual(x, meta, slot, {}, x, None)


def language(c: vlm.VLMConfig, params, reduce=()) -> Callable:
    """Jitted prefill of the language model: (rows [B, n, C], words [B, T]) -> (last hidden row, cache)."""
    bound = vlm.bind(c, params, reduce=dict(reduce), cache="full")

    @functools.partial(jax.jit, static_argnums=0)
    def run(program, arrays, params, x, words):
        out, _ = vlm.forward(Bound(program, arrays, params), None, words, visual=visual_of(c, x), phase="prefill", logits=False,
                             new_rows=16)  # fmt: skip
        return out.hidden[:, -1], out.stack.caches

    return functools.partial(run, bound.program, bound.arrays, bound.params)


def looking(c: vlm.VLMConfig, params, reduce=(), first: int | None = None, behind: bool = False) -> Callable:
    """Jitted tower, choice and projector: image -> rows [B, K, C]. ``first``: no choice, just the first rows of the tower
    (with ``behind``: of the projector)."""
    bound = vlm.bind(c, params, reduce=dict(reduce))

    @functools.partial(jax.jit, static_argnums=0)
    def run(program, arrays, params, image, words):
        mine = Bound(program, arrays, params)
        if first is not None and not behind:
            rows: Tokens = vlm.tower(mine, image)[0].streams.tokens("vision")
            return vlm.project(params, c, rows.x[:, :first], rows.meta.pos[:, :first])
        text = llm.embed(params["llm"], c.llm, words)
        return vlm.see(mine, image, prompt=(text, jnp.ones(words.shape, bool))).x[:, :first]

    return functools.partial(run, bound.program, bound.arrays, bound.params)


def measure(programs: dict[str, tuple[Callable, tuple]], repeats: int, say=print) -> dict[str, np.ndarray]:
    """Seconds [repeats] of each program."""
    for name, (f, args) in programs.items():
        began = time.perf_counter()
        jax.block_until_ready(f(*args))
        say(f"  compiled {name}  {time.perf_counter() - began:.1f} s")
    names, seconds = list(programs), {name: [] for name in programs}
    for number in range(repeats):
        for i in range(len(names)):
            name = names[(i + number * 5) % len(names)]
            f, args = programs[name]
            began = time.perf_counter()
            jax.block_until_ready(f(*args))
            seconds[name].append(time.perf_counter() - began)
    return {name: np.array(s) for name, s in seconds.items()}


def figures(o: Prefill, say=print) -> dict[str, Any]:
    """{"seconds": {program: median}, "saving", "schedules": {...}, "choosing": {...}, "unfit"}."""
    c = model(o)
    params = vlm.init(c)
    n = c.visual
    image = jax.random.normal(jax.random.key(0), (1, *c.vision.image, 1))
    words = jnp.arange(o.words)[None] % c.llm.vocab
    rows = lambda k: jax.random.normal(jax.random.key(1), (1, k, o.dim))  # noqa: E731
    made = {m: budgets.entry(m, o.average, c) for m in o.schedules} | {m: budgets.entry(m, o.keep, c) for m in o.choosers}
    unfit = {m: e.reason for m, e in made.items() if not isinstance(e, Entry)}
    inside = {m: made[m] for m in o.schedules if m not in unfit}
    inside = {m: dataclasses.replace(e, reduce=tuple(p for p in e.reduce if p[0].startswith("llm"))) for m, e in inside.items()}
    before = {m: made[m] for m in o.choosers if m not in unfit}

    counts = sorted({n, o.keep, *(k for e in inside.values() for k in e.layers if k)})
    grid = counts if len(counts) <= 9 else sorted({n, o.keep, *np.linspace(counts[0], n, 8).astype(int).tolist()})
    programs: dict[str, tuple[Callable, tuple]] = {f"language {k}": (language(c, params), (rows(k), words)) for k in grid}
    for m, e in inside.items():
        programs[m] = (language(c, params, e.reduce), (rows(e.layers[0]), words))
    programs["tower"] = (looking(c, params, first=o.keep), (image, words))
    if any(site == "project" for e in before.values() for site, _ in e.reduce):
        programs["tower and projector"] = (looking(c, params, first=o.keep, behind=True), (image, words))
    for m, e in before.items():
        programs[m] = (looking(c, params, e.reduce), (image, words))

    seconds = measure(programs, o.repeats, say)
    middle = lambda x: float(np.median(x))  # noqa: E731
    full = seconds[f"language {n}"]
    table = np.stack([seconds[f"language {k}"] for k in grid])  # [counts, rounds]
    allowed = lambda e: np.mean([[np.interp(k, grid, t) for t in table.T] for k in e.layers], 0)  # noqa: E731
    plain = {m: seconds["tower and projector" if e.reduce[-1][0] == "project" else "tower"] for m, e in before.items()}
    return {
        "seconds": {name: middle(s) for name, s in seconds.items()},
        "saving": middle(full / seconds[f"language {o.keep}"]),
        "schedules": {m: {"layers": list(e.layers), "reached": middle(allowed(e) / seconds[m]),
                          "saving": middle(full / seconds[m]), "note": e.note} for m, e in inside.items()},
        "choosing": {m: {"share": middle((seconds[m] - plain[m]) / (seconds["tower"] + full))} for m in before},
        "unfit": unfit,
    }  # fmt: skip


def page(o: Prefill, found: dict) -> str:
    ms = lambda name: f"{found['seconds'][name] * 1e3:.1f}"  # noqa: E731
    c = model(o)
    verdict = lambda ok: "met" if ok else "**missed**"  # noqa: E731
    lines = [
        "# Prefill with fewer visual tokens", "",
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores ({platform.machine()}), JAX {jax.__version__}; float32, one "
        f"prompt: {c.visual} visual tokens and {o.words} words; tower {o.vision_dim} wide, {o.vision_layers} layers; language "
        f"model {o.dim} wide, {o.layers} layers. Medians over {o.repeats} rounds, all programs in turns.", "",
        "## Reduced in front of the language model", "",
        f"{c.visual} tokens {ms(f'language {c.visual}')} ms, {o.keep} tokens {ms(f'language {o.keep}')} ms: "
        f"**{found['saving']:.2f} times** faster (asked: {ASKED['saving']:g}, {verdict(found['saving'] >= ASKED['saving'])}).",
        "", "## Inside the language model", "",
        "Reached: time that plain prefills of the layers' token counts take, over the time measured (asked: "
        f"{ASKED['schedule']:g}).", "",
        "| method | tokens per layer | ms | times faster | reached | |", "| --- | --- | ---: | ---: | ---: | --- |",
        *(f"| {m} | {', '.join(map(str, s['layers']))} | {ms(m)} | {s['saving']:.2f} | {100 * s['reached']:.0f} % | "
          f"{verdict(s['reached'] >= ASKED['schedule'])} |" for m, s in found["schedules"].items()),
        "", "## Choosing", "",
        f"Evidence, selection and gathering of {o.keep} tokens, against the same tower handing on its first {o.keep} rows; as "
        f"a share of tower and full prefill, {ms('tower')} + {ms(f'language {c.visual}')} ms (asked: at most "
        f"{100 * ASKED['choosing']:g} %).", "",
        "| method | tower to rows, ms | share of choosing | |", "| --- | ---: | ---: | --- |",
        *(f"| {m} | {ms(m)} | {100 * s['share']:.1f} % | {verdict(s['share'] <= ASKED['choosing'])} |"
          for m, s in found["choosing"].items()),
        "", *(f"- {m} is not here: {why}." for m, why in found["unfit"].items()),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"
