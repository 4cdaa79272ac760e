"""Where a token reducer stands on the axes of the survey "Token Reduction Should Go Beyond Efficiency in Generative Models",
derived from what its record declares: the site its factory names or the evidence it needs (stage), the shared machinery that
its ``apply`` reaches (operation, signal), trained arrays, tables it was calibrated to, and the rows that leave.
"""

from __future__ import annotations

import dataclasses
import dis
import inspect
import re
import types
from collections.abc import Mapping, Sequence

from jaxattn import registry
from jaxattn.core.types import Const, is_contract

ATTENTION = ("received", "value_received", "raw_value_received", "rows", "entropy", "between")
LIKENESS = {"bipartite", "nearest", "diverse", "greedy", "kmeans", "strided"}  # shared machinery that compares tokens
CHOICES = {"choose", "keep_top", "per_group", "greedy", "diverse", "top_k", "top_p"}


@dataclasses.dataclass(frozen=True)
class Place:
    """A reducer on the axes.

    stage: "in-encoder" | "pre-LLM" | "in-LLM".  operation: of select, merge, pool, resample, exit, mark.  signal: what decides:
    attention, similarity, gradient, activations, text, learned, random, position.  granularity: what leaves at once: "token",
    "token per crop", "token per layer", "image".  training: "training-free" | "calibrated" | "trained".  budget: "fixed" |
    "adaptive".
    """

    name: str
    stage: str
    operation: str
    signal: str
    granularity: str
    training: str
    budget: str


def parts_of(record, layers: int) -> tuple:
    """The records that act: the cuts of one with a schedule, with the records inside them."""
    record = record.resolve(layers) if hasattr(record, "resolve") else record
    cuts = tuple(dict.fromkeys(cut for _, cut in record.schedule(layers))) if hasattr(record, "schedule") else (record,)
    found = []
    for cut in cuts:
        inner = [getattr(cut, f.name) for f in dataclasses.fields(cut)]
        found += [cut, *(x for x in inner if is_contract(x) and hasattr(x, "apply"))]
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Reach:
    """What a record's ``apply`` reaches through the functions of its own family: ``calls``, names of functions of
    ``jaxattn.core`` and of attributes (jax.random, ...); ``texts``, constants; ``docs`` of those functions."""

    calls: frozenset[str]
    texts: frozenset[str]
    docs: str


def reached(record) -> Reach:
    """Read off the byte code, so that nothing runs."""
    calls, texts, docs, seen, todo = set(), set(), [], set(), [type(record).apply]
    while todo:
        f = inspect.unwrap(todo.pop())
        if f in seen:
            continue
        seen.add(f)
        docs.append(inspect.getdoc(f) or "")
        codes = [f.__code__]
        for code in codes:
            codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
            texts |= {c for c in code.co_consts if isinstance(c, str)}
            for step in dis.get_instructions(code):
                if step.opname in ("LOAD_GLOBAL", "LOAD_DEREF"):
                    target = f.__globals__.get(step.argval)
                elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                    calls.add(step.argval)
                    target = getattr(type(record), step.argval, None)
                else:
                    continue
                module = getattr(target, "__module__", None) or ""
                if isinstance(target, types.FunctionType) and module.startswith("jaxattn.core"):
                    calls.add(target.__name__)
                elif isinstance(target, types.FunctionType) and module.startswith("jaxattn."):
                    todo.append(target)
    return Reach(frozenset(calls), frozenset(texts), " ".join(docs))


def _stage(factory, record, parts: tuple) -> str:
    """By the site that the record declares, or its factory's text names, or else its evidence asks for."""
    scheduled = hasattr(record, "schedule")
    sites = [record.place] if hasattr(record, "place") else []
    if not sites:
        text = " ".join(re.findall(r'sites? ((?:"[\w.-]+",? ?)+)', inspect.getdoc(factory) or ""))
        sites = re.findall(r'"((?:vision|project|llm)(?:\.[\w-]+)?)"', text)
    if not sites:
        wants = {n.at for p in parts if hasattr(p, "needs") for n in p.needs() if n.what not in ("text", "features")}
        inside = scheduled or wants & {"next", "last"} or any(at.startswith("llm") for at in wants)
        sites = ["llm" if inside else "project"]
    if any(site.startswith("llm") for site in sites):
        return "in-LLM"
    within = any(site.startswith("vision.") or site == "vision" and scheduled for site in sites)
    return "in-encoder" if within else "pre-LLM"


def _operation(part, calls: frozenset[str], has_signal: bool, shorter: bool) -> str:
    chosen = bool(CHOICES & calls)
    if "reduce_merge" in calls:
        if not has_signal:
            return "pool"
        return "select + merge" if chosen else "merge"
    if {"dispose", "reduce_keep"} & calls and chosen:
        return "select + resample" if "attend" in calls else "select"
    if {"reduce_mask", "reduce_keep"} & calls and not chosen:
        return "exit" if getattr(part, "exits", "dispose" not in calls) else "select"
    if {"dispose", "reduce_mask", "reduce_keep"} & calls:
        return "select"
    return "pool" if shorter else "mark"


def _signal(part, reach: Reach) -> list[str]:
    whats = [n.what for n in part.needs()] if hasattr(part, "needs") else []
    found = ["attention"] * any(w in ATTENTION for w in whats)
    found += ["activations"] * any(w in ("transition", "hidden", "hidden_mean") for w in whats)
    found += ["similarity"] * bool(LIKENESS & reach.calls or "cosine" in reach.docs)
    # A method that asks for the projector as a function looks at how it responds.
    found += ["gradient"] * bool({"jvp", "grad", "linearize", "vjp"} & reach.calls or "project" in reach.texts)
    found += ["text"] * ("text" in whats) + ["learned"] * hasattr(part, "init")
    return found or ["random"] * ("random" in reach.calls)


def classify(name: str, record, *, layers: int = 32, n: int = 576) -> Place:
    """The place of the reducer registered as ``name``, from a record of it, in models of ``layers`` layers and ``n`` tokens."""
    factory = registry.get("tokens", name)
    parts = parts_of(record, layers)
    reach = [reached(part) for part in parts]
    signals = [_signal(p, r) for p, r in zip(parts, reach, strict=True)]
    operations = [_operation(p, r.calls, bool(s), _leaves(p, n) < n) for p, r, s in zip(parts, reach, signals, strict=True)]
    operation = max(dict.fromkeys(operations), key=len)
    every = list(dict.fromkeys(s for part in signals for s in part)) or ["position"]
    crops = any("crop" in {f.name.rstrip("s") for f in dataclasses.fields(p)} for p in parts)
    grain = "image" if operation == "exit" else "token per crop" if crops else "token"
    depths = len(record.schedule(layers)) if hasattr(record, "schedule") else 1
    grain = "token per layer" if grain == "token" and depths > 1 else grain
    tables = any(isinstance(getattr(r, f.name), Const) for r in (record, *parts) for f in dataclasses.fields(r))
    trained = "trained" if "learned" in every else "calibrated" if tables else "training-free"
    fixed = any(_leaves(p, n) < n for p in parts)
    return Place(name, _stage(factory, record, parts), operation, ", ".join(every), grain, trained,
                 "fixed" if fixed else "adaptive")  # fmt: skip


def _leaves(part, n: int) -> int:
    try:
        return part.rows(n)
    except ValueError:  # an example for another number of tokens has a number of its own: fixed
        return 0


def examples(keep: int = 64) -> dict[str, object]:
    """{name: record} of the registered token methods that need no argument, or ``keep`` alone."""
    found = {}
    for name in registry.names("tokens"):
        factory = registry.get("tokens", name)
        required = {p.name for p in inspect.signature(factory).parameters.values() if p.default is p.empty}
        if required <= {"keep"}:
            found[name] = factory(**dict.fromkeys(required, keep))
    return found


def taxonomy(records: Mapping[str, object] | None = None, **sizes) -> tuple[Place, ...]:
    """Places of ``records`` {name: record} (None: ``examples``), by stage and name."""
    order = ("in-encoder", "pre-LLM", "in-LLM")
    places = [classify(name, record, **sizes) for name, record in (examples() if records is None else records).items()]
    return tuple(sorted(places, key=lambda p: (order.index(p.stage), p.name)))


def markdown(rows: Sequence) -> str:
    """A table of dataclass records of one kind, their fields as columns."""
    names = [f.name for f in dataclasses.fields(rows[0])]
    text = lambda x: f"{x:.3f}" if isinstance(x, float) else str(x)  # noqa: E731
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|" + " --- |" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(text(getattr(row, n)) for n in names) + " |" for row in rows]) + "\n"


__all__ = ["Place", "classify", "examples", "markdown", "parts_of", "reached", "taxonomy"]
