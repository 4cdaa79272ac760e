"""From a budget to a method's arguments: every token method of the registry at the same number of visual tokens.

    entries, unfit = plan(registry.names("tokens"), (72, 36, 16), model)

A budget is the mean number of visual tokens over the layers of the language model. A method with an argument ``keep`` meets
it by itself; for the others ``RULES`` says how one number becomes their arguments, and the largest number that stays within
the budget is searched on the records' own row counts. A method that meets no budget is returned with the reason.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxattn import registry
from jaxattn.core.record import BUCKETS, bucket
from jaxattn.core.types import expect
from models.bind import as_record, needs_of, scheduled
from models.multimodal import vlm

FULL = "full"
STEPS = 4096  # fineness of a searched number


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method at a budget. ``reduce``: what is bound, site -> record; ``layers``: visual tokens in each layer of the
    language model; ``merges``: tokens are averaged, none is lost as a whole; ``note``: what stands in front of it."""

    method: str
    budget: int
    reduce: tuple[tuple[str, Any], ...]
    layers: tuple[int, ...]
    merges: bool = False
    note: str = ""

    @property
    def tokens(self) -> float:
        """Visual tokens of a layer of the language model, on average."""
        return sum(self.layers) / len(self.layers)

    @property
    def label(self) -> str:
        return self.method if self.method == FULL else f"{self.method} {self.budget}"


@dataclasses.dataclass(frozen=True)
class Unfit:
    """A method (at a budget, or at all where that is None) without a fair place on the board."""

    method: str
    budget: int | None
    reason: str


# ---------------------------------------------------------------------------------------------------------- the rules
@dataclasses.dataclass(frozen=True)
class Rule:
    """How a method meets a budget.

    site: where it is bound.  given: (number, rows that come in, layers) -> arguments; layers of the language model, or those
      of the tower that run where the site is there.
    number: what that number is. "budget": the budget itself; "share": a share in (0, 1], searched; "enter": the rows that
      come in, searched, behind ``front``.
    front: the method that brings the rows down in front of it. For "share" only where the layers before its first cut
      would exceed the budget by themselves; then about twice the budget enters.
    beside: (site, method) pairs that belong to it.
    """

    site: str
    given: Callable[[float, int, int], dict[str, Any]] = lambda number, n, depth: {"keep": number}
    number: str = "budget"
    front: str = "uniform"
    beside: tuple[tuple[str, str], ...] = ()


def merge_parts(n: int, left: int) -> tuple[int, ...]:
    """Arguments ``parts`` of ``aim_merge`` that leave ``left`` of ``n`` tokens: halving, then what is still too many."""
    parts, rows = [], n
    while rows > left:
        pairs = min(rows // 2, rows - left)
        part = n // pairs
        part += n // part > pairs  # a pass merges n // part pairs: not more than there are
        parts.append(part)
        rows -= n // part
    return tuple(parts)


def places(published: tuple[int, ...], of: int, depth: int) -> tuple[int, ...]:
    """Numbers of layers done at the published cuts of a stack of ``of`` layers, in one of ``depth``: as many as have room."""
    found: list[int] = []
    for layer in published:
        at = max(round(layer * depth / of), found[-1] + 1 if found else 1)
        if at < depth:
            found.append(at)
    return tuple(found)


def powers(shares: tuple[float, ...], x: float, count: int) -> tuple[float, ...]:
    """Published shares raised to one power, which keeps their shape: all 1 at x = 1, nothing left at x = 0."""
    return tuple(max(s ** ((1 - x) / x), 1e-6) for s in shares[:count])


def _rows(x, n, depth):
    return {"keep": max(1, int(x * n))}


def _windows(left, n, depth):
    least = -(-(n - left) // 8)
    expect("budget", left, f"at least {n - n // 9 * 8} tokens, one for each window of 3 x 3 patches", least <= n // 9)
    return {"threshold": 2.0, "least": least}


def _dymu(x, n, layers):
    merges, least = int((1 - x) * n), []
    for i in range(layers):
        pairs = (n - sum(least)) // 2  # a matching halves the rows at most
        least.append(min(pairs, merges // layers + (i < merges % layers)))
    return {"thresholds": 2.0, "least": tuple(least)}


def _pyramiddrop(x, n, depth):
    at = places((8, 16, 24), 32, depth)
    return {"layers": at, "ratios": powers((0.5, 0.25, 0.125), x, len(at))}


def _transprune(x, n, depth):
    at = places((7, 9, 12), 32, depth)
    return {"layers": at, "ratios": powers((0.875, 0.625, 0.125), x, len(at))}


def _adaptinfer(x, n, depth):
    at = places((2, 11, 21), 32, depth)
    shares = powers((133 / 576, 27 / 576, 3 / 576), x, len(at))
    return {"layers": tuple(i - 1 for i in at), "keep": tuple(int(n * s) for s in shares)}


def _mustdrop(x, n, depth):
    at = places((3, 7, 11, 15), 32, depth)
    shares = powers((0.5, 0.25, 0.125, 0.0625), x, len(at))
    return {"layers": tuple(i - 1 for i in at), "capacity": tuple(max(1, int(n * s)) for s in shares)}


def _visiondrop_stages(enter, n, depth):
    at = places((8, 16, 24), 32, depth)
    pairs = ((30, 5), (22, 4), (16, 3))[: len(at)]
    scaled = tuple((max(1, int(enter * a / 48 + 0.5)), int(enter * b / 48 + 0.5)) for a, b in pairs)
    return {"layers": at, "keep": scaled}


def _vflowopt_stages(enter, n, depth):
    at = places((9, 18), 28, depth)
    return {"layers": at, "ratios": (0.983, 0.877)[: len(at)]}


RULES: dict[str, Rule] = {
    # In front of the language model. Those that need nothing else are here for their site.
    "holov": Rule("project"),
    "todre": Rule("project"),
    "zoo_prune": Rule("project"),
    "textmonkey": Rule("project"),
    "flowcut": Rule("vision"),
    "aim_merge": Rule("project", lambda left, n, depth: {"parts": merge_parts(n, left)}),
    "visiondrop": Rule("vision", lambda left, n, depth: {"dominant": left - left // 8, "contextual": left // 8}),
    "mustdrop_merge": Rule("vision.1", _windows),
    "vmtc": Rule("vision", lambda left, n, depth: {"keep": left - max(1, left // 8), "clusters": max(1, left // 8)}),
    "dymu": Rule("vision", _dymu, "share"),
    "vflowopt": Rule("vision", lambda x, n, depth: {"ratio": x, "cell": max(1.0, 15.58 / 27 * n**0.5)}, "share"),
    # One cut behind the first layers (two of 32 as published).
    "fastv": Rule("llm.first", _rows, "share"),
    "flowcut_text": Rule("llm.first", _rows, "share"),
    "attention_debiasing": Rule(
        "llm.first", lambda x, n, depth: {"host": f"fastv:keep={max(1, int(x * n))}", "decay": 0.003 * 576 / n}, "share"
    ),
    # Schedules: one number scales the published shape.
    "pyramiddrop": Rule("llm", _pyramiddrop, "share"),
    "transprune": Rule("llm", _transprune, "share"),
    "adaptinfer": Rule("llm", _adaptinfer, "share"),
    "mustdrop": Rule("llm", _mustdrop, "share", "mustdrop_merge", (("vision", "mustdrop_keys"),)),
    "adatoken_3d": Rule("llm", lambda x, n, depth: {"rates": tuple(x**i for i in range(depth))}, "share"),
    "g_search": Rule("llm", lambda x, n, depth: {"keep": x}, "share"),
    # The whole of a method: reduced before the language model, then inside it with the published shape.
    "aim": Rule("llm", lambda enter, n, depth: {"start": 0, "end": depth - 2}, "enter", "aim_merge"),
    "visiondrop_stages": Rule("llm", _visiondrop_stages, "enter", "visiondrop"),
    "vflowopt_stages": Rule("llm", _vflowopt_stages, "enter", "vflowopt"),
    "visual_exit": Rule("llm", lambda enter, n, depth: {"layer": max(0, depth // 2 - 1)}, "enter"),
    "todre_exit": Rule("llm", lambda enter, n, depth: {}, "enter", "todre"),
}
UNFIT = {
    "as_vit": "its thresholds are trained together with the tower",
    "dyvte": "its routers are trained; visual_exit is the constant that it is measured against",
    "mustdrop_keys": "it labels patches and drops none: a part of mustdrop",
    "focusui": "its scorer is trained on regions of screenshots",
    "sit": "its slimming modules are trained",
    "tokenflex": "its projector is trained in place of the model's",
    "quota": "it shares a budget among the frames of a video, and these are single images",
}
TRAINED = {  # rules of methods that are on the board with their trained parts alone
    "dyvte": Rule("llm", lambda enter, n, depth: {}, "enter", "k_center"),
    "focusui": Rule("project", lambda left, n, depth: {"ratio": 1 - (left - 1) // 2 / n, "capacity": left}),
    "tokenflex": Rule("project", lambda left, n, depth: {"keep": math.isqrt(left) ** 2}),
}
NEUTRAL = ("textmonkey",)  # trained parts that start as no change: fair without training
NOTES = {
    "dymu": "as many merges for every image: its thresholds are not calibrated",
    "adatoken_3d": "its shares fall geometrically: they are not calibrated",
    "attention_debiasing": "on fastv, with the published trend scaled to this number of tokens",
    "textmonkey": "its cross-attention is not trained: it starts as no change",
    "visual_exit": "all visual tokens leave after half of the layers",
    "todre_exit": "images whose visual tokens leave early are counted as if they stayed",
    "vflowopt": "published settings, not searched",
    "vflowopt_stages": "published settings, not searched",
}


TRAINED_NOTES = {
    "dyvte": "images whose visual tokens leave early are counted as if they stayed",
    "tokenflex": "the largest square number within the budget",
    "focusui": "half of the budget, since every dropped run leaves a marker",
}


# ----------------------------------------------------------------------------------------------------------- counting
def count(record, n: int) -> int:
    """Rows that are left of ``n`` by the record's own account (its arrays may have a few empty ones more)."""
    if hasattr(record, "host"):
        return count(record.host, n)
    if callable(getattr(record, "count", None)):
        return min(n, record.count(n))
    keep, rows = getattr(record, "keep", None), min(n, record.rows(n))
    # A budget's arrays are as long as its bucket; what has more rows than that leaves others beside the ones it keeps.
    exact = isinstance(keep, int) and rows in (n, bucket(keep))
    return min(rows, keep) if exact else rows


def rows_by_layer(reduce: Sequence[tuple[str, Any]], model: vlm.VLMConfig) -> tuple[int, ...]:
    """Visual tokens that each layer of the language model reads."""
    n, depth, towers, cuts = model.visual, model.llm.layers, {}, {}
    between: dict[str, Any] = {}
    for site, record in reduce:
        family, _, layer = site.partition(".")
        if family == "llm":
            cuts[layer] = record
        elif layer or (family == "vision" and hasattr(record, "schedule")):
            towers[layer] = record
        else:
            between[site] = record
    for layer, record in scheduled(towers, model.vision.layers, "vision"):
        n = count(record, n) if layer < model.run_layers else n  # a cut behind the select layer never happens
    for site in ("vision", "project"):
        n = count(between[site], n) if site in between else n
    left, rows = dict.fromkeys(range(depth)), []
    for layer, record in _in_language(cuts, depth, n):
        left[layer] = record
    for layer in range(depth):
        n = count(left[layer], n) if left[layer] is not None else n
        rows.append(n)
    return tuple(rows)


def _in_language(cuts: dict, depth: int, n: int):
    """(layer, record) pairs, of ``n`` rows that enter where a schedule can be told."""
    for where, record in cuts.items():
        known = "n" in inspect.signature(record.schedule).parameters if hasattr(record, "schedule") else False
        yield from record.schedule(depth, n) if known else scheduled({where: record}, depth, "llm")


# ----------------------------------------------------------------------------------------------------------- planning
def plan(methods: Sequence[str], budgets: Sequence[int], model: vlm.VLMConfig, *,
         positions: str | None = None) -> tuple[tuple[Entry, ...], tuple[Unfit, ...]]:  # fmt: skip
    """(entries of every method at every budget, the full model first; what does not fit, with the reason).

    A method is ``full`` or a token method of the registry, such as ``hiprune:alpha=0.2``. positions: given to every method
    that has the argument; None: each method's own default. Raises ValueError for an unknown method, unknown arguments, or a
    budget that is none.
    """
    n = model.visual
    for budget in budgets:
        expect("budgets", budget, f"a number of tokens from 1 to {n}", 1 <= budget <= n)
    entries, unfit = [Entry(FULL, n, (), (n,) * model.llm.layers)], []
    for budget in sorted(budgets, reverse=True):
        for method in methods:
            if method == FULL:
                continue
            found = entry(method, budget, model, positions=positions)
            entries.append(found) if isinstance(found, Entry) else unfit.append(found)
    return tuple(entries), tuple(dict.fromkeys(unfit))


def entry(method: str, budget: int, model: vlm.VLMConfig, *, positions: str | None = None,
          trained: bool = False) -> Entry | Unfit:  # fmt: skip
    """One method at ``budget`` visual tokens per layer (on average, where layers differ); ``trained``: with parts that were,
    as its arguments say but for those that meet the budget."""
    name = name_of(method)
    accepted = inspect.signature(registry.get("tokens", name)).parameters
    trained_rule = TRAINED.get(name) if trained else None
    if name in UNFIT and trained_rule is None:
        return Unfit(method, None, UNFIT[name])
    rule = trained_rule or RULES.get(name)
    whole = "keep" in accepted and accepted["keep"].annotation in (int, "int", inspect.Parameter.empty)
    if rule is None and not whole:
        return Unfit(method, None, f"no rule says how its arguments meet a budget: {', '.join(accepted) or 'it has none'}")
    try:
        reduce, note = _meet(_free(method, rule, budget, model) if trained else method, rule, budget, model, positions)
        layers = rows_by_layer(reduce, model)
        expect("budget", budget, f"more: it leaves {max(layers)} rows", sum(layers) <= budget * len(layers))
    except ValueError as error:
        return Unfit(method, budget, str(error))
    parts = [site for site, record in reduce if hasattr(record, "init")]
    if parts and name not in NEUTRAL and not trained:
        return Unfit(method, None, "it has parts that are trained, and these checkpoints were trained without them")
    note = "; ".join(x for x in (note, (TRAINED_NOTES if trained else NOTES).get(name, "")) if x)
    return Entry(method, budget, reduce, layers, any(not hasattr(r, "mode") for s, r in reduce if s[:3] != "llm"), note)


def name_of(method: str) -> str:
    return method.partition(":")[0].strip().replace("-", "_")


def _free(method: str, rule: Rule | None, budget: int, model: vlm.VLMConfig) -> str:
    """The method without the arguments that the rule sets."""
    name, _, text = method.partition(":")
    sets = {"keep"} if rule is None else set(rule.given(budget, model.visual, model.llm.layers))
    kept = {key: value for key, value in registry.given(name, text).items() if key not in sets}
    return f"{name}:{','.join(f'{k}={v}' for k, v in kept.items())}" if kept else name


def build(method: str, arguments: dict[str, Any], model: vlm.VLMConfig, positions: str | None):
    """The record of "name" or "name:arg=value" with more arguments."""
    name, _, given = method.partition(":")
    accepted = inspect.signature(registry.get("tokens", name)).parameters
    if positions is not None and "positions" in accepted and "positions=" not in given:
        arguments = {**arguments, "positions": positions}
    more = ",".join(f"{k}={v!r}" for k, v in arguments.items())
    text = ",".join(x for x in (given, more) if x)
    return as_record("tokens", f"{name}:{text}" if text else name, model.vision.layers)


def _meet(method: str, rule: Rule | None, budget: int, model: vlm.VLMConfig, positions):
    """(sites and records that meet the budget, note)."""
    n, depth = model.visual, model.llm.layers
    if rule is None:
        record = build(method, {"keep": budget}, model, positions)
        return ((_site(record, depth), record),), ""
    layers = model.run_layers if rule.site.startswith("vision") else depth
    site = rule.site.replace("first", str(max(1, round(2 * depth / 32))))
    beside = tuple((where, build(name, {}, model, positions)) for where, name in rule.beside)

    def made(number, enter: int):
        """All that is bound, with ``enter`` rows before the method."""
        record = build(method, rule.given(number, enter, layers), model, positions)
        if enter == n:
            return (*beside, (site, record))
        said = record.positions if "positions=" in method else positions  # where a method's rows stand, its front's do
        front = entry(rule.front, enter, model, positions=said)
        if isinstance(front, Unfit):
            raise ValueError(front.reason)
        whole = (*front.reduce, *beside, (site, record))
        expect("budget", budget, "more: its cuts leave too many rows", len(dict(whole)) == len(whole))
        return whole

    def fits(reduce) -> bool:
        return sum(rows_by_layer(reduce, model)) <= budget * depth

    if rule.number == "budget":
        return made(budget, n), ""
    if rule.number == "enter":
        enter = _largest(lambda rows: fits(made(rows, rows)), 1, n)
        return made(enter, enter), "" if enter == n else f"behind {rule.front} {enter}"
    if fits(made(1 / STEPS, n)):
        x = _largest(lambda step: fits(made(step / STEPS, n)), 1, STEPS) / STEPS
        return made(x, n), ""
    # A whole bucket: cuts by shares count the empty rows of a larger one, too.
    enter = _near(rule.front, max(b for b in BUCKETS if b <= min(n, 2 * budget)), model, positions)
    expect("budget", budget, "more: its first cut comes too late in this language model", fits(made(1 / STEPS, enter)))
    x = _largest(lambda step: fits(made(step / STEPS, enter)), 1, STEPS) / STEPS
    return made(x, enter), f"behind {rule.front} {enter}"


def _near(front: str, rows: int, model: vlm.VLMConfig, positions) -> int:
    """The rows that ``front`` leaves when it is asked for ``rows``, or for the fewest it can leave above them."""
    for asked in range(rows, model.visual + 1):
        found = entry(front, asked, model, positions=positions)
        if isinstance(found, Entry):
            return found.layers[0]
    raise ValueError(f"budget: {front} leaves nothing in front of it")


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number in [low, high] that fits, where what fits is an interval from ``low``; ``low`` if none does."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _site(record, depth: int) -> str:
    """Where a method without a rule acts: what it asks for says so."""
    wants = [need for need in needs_of(record) if need.what != "features"]
    if any(need.at in ("next", "last") or need.at.startswith("llm") for need in wants if need.what != "text"):
        return f"llm.{max(1, round(2 * depth / 32))}"
    # What reads the question needs tokens and words in one space: behind the projector.
    return "project" if any(need.what == "text" for need in wants) else "vision"
