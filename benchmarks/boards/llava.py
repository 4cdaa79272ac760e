"""What token methods cost and save in a model of the size of LLaVA-1.5-7B: operations of a prefill and bytes of its cache,
counted on shapes alone. No weights exist and nothing runs.

Two prompts of 35 + 29 words: a picture of one crop (576 visual tokens), and one of a thumbnail and four tiles (2,880).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.boards import budgets
from benchmarks.boards.budgets import FULL, Entry, Unfit
from benchmarks.boards.cost import Work, array_bytes, traced
from jaxattn import registry
from jaxattn.tokens import focusui_rows
from models.bind import Bound, as_record
from models.generate import prefill
from models.hub import place_pictures
from models.language import llm
from models.multimodal import vlm
from models.vision import vit
from pallas_kernels import _dispatch

WORDS, BEFORE = 64, 35  # of a prompt, and those in front of the picture
PARTS = ("choose", "vision", "project")  # named scopes of a pass; the rest is the language model
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
CROPS = 5
LEGEND = (
    "tokens: visual tokens in a layer of the language model, on average over its layers; rows of arrays are those of the "
    "budget's bucket, so a few may be empty.",
    "tower, projector, choosing, language model: floating-point operations (two per multiply-add of a matrix product, one per "
    "elementwise operation and reduced entry) of one prompt. Choosing is evidence and selection together: attention rows that "
    "are formed for the scores, projections made for them, similarities, sorting, merging.",
    "Attention counts every pair of rows, as its formula does; a kernel skips what a causal mask hides. A layer that runs only "
    "for a method's evidence (of a tower read at its last layer but one) counts with the tower.",
    "share of choosing: of the tower and the full model's language model, what it has to be small against. "
    "prefill: operations of all parts, as a share of the full model's.",
    "cache: keys, values and positions of the prompt, bfloat16.",
)


def llava(crops: int = 1) -> vlm.VLMConfig:
    """LLaVA-1.5-7B's sizes, and LLaVA-NeXT's where a picture is several crops."""
    tower = vit.config(336, 14, 24, 1024, 16, activation="quick_gelu", stem_bias=False, pre_norm=True, special_positions=1,
                       eps=1e-5)  # fmt: skip
    language = llm.config(32064, 32, 4096, 32, hidden=11008, tie=False, length=4096)
    tiled = dict(newline=True, pinpoints=PINPOINTS) if crops > 1 else {}
    return vlm.VLMConfig(tower, language, 4096, **tiled)


def prompt(c: vlm.VLMConfig, crops: int) -> dict[str, Any]:
    """Arguments of ``prefill`` as shapes; what is known of the rows of several crops as arrays."""
    words = jax.ShapeDtypeStruct((1, WORDS), jnp.int32)
    side = c.vision.image[0]
    if crops == 1:
        image = jax.ShapeDtypeStruct((1, side, side, c.vision.channels), jnp.float32)
        return {"tokens": words, "image": image, "image_at": BEFORE}
    high = side * int((crops - 1) ** 0.5)
    tokens = np.full((1, WORDS + 1), 5, np.int32)
    tokens[0, BEFORE] = 1
    picture = (np.zeros((crops, side, side, c.vision.channels), np.float32), (high, high))
    return {"tokens": words, "image": place_pictures(c, tokens, 1, [[picture]])[2]}


def _focusui(budget: int, n: int, crops: int) -> str:
    share = next(s / 1000 for s in range(1000) if focusui_rows(n, s / 1000) <= budget)
    return f"focusui:ratio={share},capacity={budget}"


# Methods without a fair place on a board of answers, but with a known cost: (site, (budget, tokens, crops) -> text, note).
OWN: dict[str, tuple[str, Callable[[int, int, int], str], str]] = {
    "focusui": ("project", _focusui, "untrained; markers count as tokens"),
    "quota": ("project", lambda budget, n, crops: f"quota:total={budget},scores={(1 / crops,) * crops},grid=(24, 24)",
              "crops stand for frames, which share alike; their scores come from another model and are not counted"),
    "textmonkey": ("project", lambda budget, n, crops: f"textmonkey:keep={budget}", "untrained"),
    "vmtc": ("vision", lambda budget, n, crops: f"vmtc:keep={budget - 16}", "16 of the tokens are clusters"),
    "visual_exit": ("llm", lambda budget, n, crops: f"visual_exit:layer={max(0, round(32 * budget / n) - 1)}", ""),
    "sit": ("vision", lambda budget, n, crops: f"sit:ratios={tuple((budget / n) ** (i / 3) for i in (1, 2, 3))}", "untrained"),
}


def plan(method: str, budget: int, c: vlm.VLMConfig, crops: int) -> Entry | Unfit:
    """The method at ``budget`` tokens of all crops together. A cut inside the tower is of each crop, as the model reads it."""
    if method in OWN and method in registry.names("tokens"):
        site, text, note = OWN[method]
        try:
            each = crops if site == "vision" and method == "sit" else 1
            record = as_record("tokens", text(budget // each, c.visual * crops // each, crops), c.vision.layers)
            layers = budgets.rows_by_layer(((site, record),), _wide(c, crops // each))
        except ValueError as error:
            return Unfit(method, budget, str(error))
        return Entry(method, budget, ((site, record),), tuple(each * k for k in layers), note=note)
    if crops > 1 and method == "vflowopt":
        method += f":maps={(c.vision.grid,) * crops}"
    found = budgets.entry(method, budget, _wide(c, crops))
    if isinstance(found, Entry):
        found = dataclasses.replace(found, method=method.partition(":maps")[0])
    inside = isinstance(found, Entry) and any(
        site.startswith("vision.") or site == "vision" and hasattr(record, "schedule") for site, record in found.reduce
    )
    if crops == 1 or not inside:
        return found
    if any(site.startswith("llm") for site, _ in found.reduce):
        return Unfit(method, budget, "it cuts every crop inside the tower and all of them together later")
    found = budgets.entry(method, budget // crops, c)
    return dataclasses.replace(found, budget=budget, layers=tuple(crops * n for n in found.layers))


def _wide(c: vlm.VLMConfig, crops: int) -> vlm.VLMConfig:
    """A model that reads as many tokens in one crop, to plan by."""
    side = c.vision.image[0]
    return dataclasses.replace(c, vision=dataclasses.replace(c.vision, image=(side * crops, side)), pinpoints=(), newline=False)


@functools.cache
def shapes(c: vlm.VLMConfig) -> Any:
    return jax.eval_shape(lambda: vlm.init(c))


def measure(reduce, c: vlm.VLMConfig, crops: int, dtype="bfloat16") -> tuple[dict[str, Work], int]:
    """(work of one prefill by part, "" being the language model; bytes of its cache)."""
    params, programs = shapes(c), []

    def build():
        bound = vlm.bind(c, params, reduce=dict(reduce), cache="full")
        programs.append(bound.program)
        return bound.arrays

    # What is trained is as wide as the model: shapes of it will do.
    arrays = jax.eval_shape(build) if any(hasattr(record, "init") for _, record in reduce) else build()
    program = programs[0]
    said = prompt(c, crops)
    image_at = said.pop("image_at", None)

    def run(arrays, params, said):
        last, state = prefill(Bound(program, arrays, params), **said, image_at=image_at, max_new=1, dtype=np.dtype(dtype))
        return last, state.caches

    with _dispatch.unnamed("reference"):
        found, (_, caches) = traced(run, arrays, params, said, scopes=PARTS)
    return found, array_bytes(caches)


def row(e: Entry, crops: int, c: vlm.VLMConfig, full: dict | None) -> dict[str, Any]:
    """One line of the study; ``full``: that of the full model, None for itself."""
    began = time.perf_counter()
    found, cache = measure(e.reduce, c, crops)
    parts = {"tower": found["vision"], "projector": found["project"], "choosing": found["choose"], "language": found[""]}
    flops = {name: w.total for name, w in parts.items()}
    total, base = sum(flops.values()), full["flops"] if full else flops
    return {
        "method": e.method, "budget": e.budget, "visual": c.visual * crops, "tokens": e.tokens, "layers": list(e.layers),
        "sites": {site: str(record) for site, record in e.reduce}, "note": e.note, "flops": flops,
        "matmul": {name: w.matmul for name, w in parts.items()}, "total": total,
        "share": total / sum(base.values()), "choosing_share": flops["choosing"] / (base["tower"] + base["language"]),
        "cache_bytes": cache, "cache_share": cache / (full["cache_bytes"] if full else cache),
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def study(methods: Sequence[str], tokens: Sequence[int], pictures: Sequence[int], known: Sequence[dict] = (),
          say=print) -> Iterator[dict[str, Any]]:  # fmt: skip
    """{"rows": [...], "unfit": [...]} of every method, at ``tokens`` of each crop of pictures of so many crops, after each row
    that is new; ``known``: rows of an earlier study, which are taken as they are."""
    rows, unfit = [], []
    before = {(r["visual"], r["method"], r["budget"]): r for r in known}
    for crops in pictures:
        c = llava(crops)
        n = c.visual * crops
        full = before.get((n, FULL, n)) or row(Entry(FULL, n, (), (n,) * c.llm.layers), crops, c, None)
        rows.append(full)
        for budget in tokens:
            for method in methods:
                if (n, method, budget * crops) in before:
                    rows.append(before[n, method, budget * crops])
                    continue
                found = plan(method, budget * crops, c, crops)
                if isinstance(found, Entry):
                    try:
                        rows.append(row(found, crops, c, full))
                        say(f"  {n} -> {found.label}  {rows[-1]['share']:.3f}  {rows[-1]['seconds']:.1f} s")
                        yield {"rows": rows + [r for r in known if r not in rows], "unfit": unfit}
                        continue
                    except ValueError as error:
                        found = Unfit(method, budget * crops, str(error))
                reason = {"visual": n, "method": method, "budget": found.budget, "reason": found.reason}
                unfit += [] if reason in unfit else [reason]
                say(f"  {n} -> {method} {budget * crops}: {found.reason}")
    yield {"rows": rows, "unfit": unfit}


COLUMNS = ("method", "tokens", "tower G", "projector G", "choosing G", "share of choosing", "language model T", "prefill",
           "cache MB", "cache")  # fmt: skip


def cells(r: dict) -> tuple[str, ...]:
    f = r["flops"]
    return (r["method"], f"{r['tokens']:.4g}", f"{f['tower'] / 1e9:,.0f}", f"{f['projector'] / 1e9:.1f}",
            f"{f['choosing'] / 1e9:.3g}", f"{100 * r['choosing_share']:.2f} %", f"{f['language'] / 1e12:.2f}",
            f"{100 * r['share']:.1f} %", f"{r['cache_bytes'] / 1e6:.0f}", f"{100 * r['cache_share']:.1f} %")  # fmt: skip


def markdown(found: dict, day: str) -> str:
    lines = ["# Token methods in a model of LLaVA-1.5-7B's size", "",
             f"Counted on {day} (JAX {jax.__version__}) from the traced programs' shapes; nothing ran. A tower of 24 layers "
             "(CLIP ViT-L/14 at 336 pixels), a language model of 32 layers 4,096 wide; "
             f"{WORDS} words. `python -m benchmarks cost` writes this file."]  # fmt: skip
    for visual in dict.fromkeys(r["visual"] for r in found["rows"]):
        here = [r for r in found["rows"] if r["visual"] == visual]
        for budget in sorted({r["budget"] for r in here if r["method"] != FULL}, reverse=True):
            rows = sorted((r for r in here if r["budget"] == budget and r["method"] != FULL), key=lambda r: r["total"])
            lines += ["", f"## {visual:,} visual tokens to {budget}", "", "| " + " | ".join(COLUMNS) + " |",
                      "|" + "".join(" --- |" if c == "method" else " ---: |" for c in COLUMNS)]  # fmt: skip
            lines += ["| " + " | ".join(cells(r)) + " |" for r in [r for r in here if r["method"] == FULL] + rows]
    lines += ["", *(f"- {text}" for text in LEGEND)]
    notes = dict.fromkeys(f"- {r['method']}: {r['note']}." for r in found["rows"] if r["note"])
    lines += ["", "What stands in front of a method, or beside it:", "", *notes] if notes else []
    missing = [f"- {u['method']}" + (f" at {u['budget']}" if u["budget"] else "") + f" of {u['visual']:,}: {u['reason']}."
               for u in found["unfit"]]  # fmt: skip
    lines += ["", "Not counted:", "", *missing] if missing else []
    return "\n".join(lines) + "\n"
