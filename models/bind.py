"""Sockets live outside the module: ``bind`` turns a model's sockets into a static program and its arrays.

The program is hashable and compared by value, so two models bound to equal methods share every compiled function; the
arrays hold operands (gains, thresholds, budgets, layer sets, plans), so changing them compiles nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import registry
from jaxattn.core import types
from jaxattn.core.types import Need, contract, expect, is_contract, split


@contract
class dense:
    """Plain attention over every key the mask shows: the default of the attention socket."""

    def apply(self, params, state, call, ctx):
        from jaxattn.core.attend import attend_call

        return attend_call(call)[0], state, {}


@contract
class by_layer:
    """A plan: which attention each layer runs. ``kinds``: distinct Attention records; ``which``: one number per layer.

    ``which`` is an operand: rearranging a plan over the same kinds compiles nothing."""

    kinds: tuple
    which: tuple = types.operand("array", ())


@contract
class Cut:
    """A TokenTransform at the entrance of layer ``layer`` (or at a named site beside the stacks)."""

    layer: int
    name: str
    transform: Any

    @property
    def inside(self) -> bool:
        """Whether it acts inside the layer, between attention and feed-forward."""
        return getattr(self.transform, "inside", False)


@contract
class StackProgram:
    """Everything static about one stack of layers."""

    block: Any
    layers: int
    site: str
    attention: tuple = (dense(),)
    cuts: tuple = ()
    cache: Any = None
    steering: tuple = ()
    needs: tuple = ()
    remat: bool = False


@contract
class Program:
    """A bound model without its arrays. ``stacks`` maps site names to StackPrograms; ``sites`` holds the transforms that
    act between the stacks (name -> record); ``newlines``: which rows that end lines of patches are read."""

    config: Any
    stacks: tuple
    sites: tuple = ()
    newlines: str = "all"

    def stack(self, site: str) -> StackProgram:
        return dict(self.stacks)[site]

    def transform(self, site: str):
        return dict(self.sites).get(site)


class Bound(NamedTuple):
    """(program, arrays, params): what ``generate`` and the forward functions take. ``params`` are the model's weights,
    untouched by binding; ``arrays["operands"]`` are the sockets' values and ``arrays["trained"]`` their weights."""

    program: Program
    arrays: dict
    params: Any


def as_record(socket: str, value, n_layers: int | None = None):
    """A record from a record or from its command-line form ``name:arg=value``; one whose defaults depend on depth is
    resolved for a stack of ``n_layers``."""
    record = registry.parse(socket, value) if isinstance(value, str) else value
    expect(socket, type(value).__name__, "a method's record or its name", is_contract(record))
    return record.resolve(n_layers) if n_layers is not None and hasattr(record, "resolve") else record


def bind_stack(block, n_layers: int, site: str, *, attention=None, reduce=None, cache=None, steering=None, remat=False,
               trained=None, key=None, rows=None) -> tuple[StackProgram, dict, dict]:  # fmt: skip
    """(program, operands, trained arrays) of one stack. ``reduce``: {layer number or "" for a schedule: record}; ``rows``:
    visual rows that enter, so that a budget beyond them is an error here and not inside a jitted pass."""
    spec = block.spec(n_layers)
    plan = dense() if attention is None else as_record("attention", attention, n_layers)
    kinds, which = (plan.kinds, plan.which) if isinstance(plan, by_layer) else ((plan,), ())
    which = which.numpy() if isinstance(which, types.Const) else np.asarray(which or [0] * n_layers)
    expect("attention.which", f"{len(which)} entries", f"one per layer, {n_layers}", len(which) == n_layers)
    expect("attention.which", which.tolist(), f"numbers below {len(kinds)}", which.size == 0 or which.max() < len(kinds))
    kinds = tuple(as_record("attention", k, n_layers) for k in kinds)
    operands: dict = {"which": which.astype(np.int32)}
    fresh: dict = {}
    programs = []
    for i, kind in enumerate(kinds):
        program, operands[f"attention.{i}"] = split(kind, spec)
        programs.append(program)
        if hasattr(kind, "init"):
            keys = jax.random.split(jax.random.key(0) if key is None else key, n_layers)
            fresh[f"attention.{i}"] = jax.vmap(lambda k, kind=kind: kind.init(k, spec))(keys)
    cuts = []
    for layer, record in scheduled(reduce or {}, n_layers, site):
        entered, rows = rows, left(record, rows)
        program, operands[f"cut.{len(cuts)}"] = split(record, spec)
        if hasattr(record, "init"):
            known = spec.replace(length=entered or 0)
            fresh[f"cut.{len(cuts)}"] = record.init(jax.random.key(0) if key is None else key, known)
        cuts.append(Cut(layer, f"cut.{len(cuts)}", program))
    if cache is not None:
        cache, operands["cache"] = split(as_record("cache", cache, n_layers), spec)
    steers = () if steering is None else steering if isinstance(steering, tuple) else (steering,)
    steered = []
    for i, s in enumerate(steers):
        program, operands[f"steering.{i}"] = split(as_record("steering", s, n_layers), spec)
        steered.append(program)
    needs = collect_needs(tuple(c for c in cuts), cache, tuple(steered), site, n_layers)
    program = StackProgram(block, n_layers, site, tuple(programs), tuple(cuts), cache, tuple(steered), needs, remat)
    # Device arrays: methods index their tables by a traced layer number, in and out of jit.
    return program, jax.tree.map(jnp.asarray, operands), {**fresh, **(trained or {})}


def left(record, rows: int | None) -> int | None:
    """Visual rows that a transform leaves of ``rows``; None: not known."""
    return rows if rows is None or getattr(record, "acts_on", "vision") != "vision" else record.rows(rows)


def scheduled(reduce: dict, n_layers: int, site: str):
    """(layer, record) pairs in order of depth; multi-site records expand to one record per cut."""
    pairs = []
    for where, record in reduce.items():
        record = as_record("tokens", record, n_layers)
        if hasattr(record, "schedule"):
            pairs += list(record.schedule(n_layers))
        else:
            ok = where.isdecimal() and 0 < int(where) < n_layers
            at = f"{site}.{where}" if where else site
            expect(f"reduce[{at}]", where or "none", f"a layer between 1 and {n_layers - 1}, or a method with a schedule", ok)
            pairs.append((int(where), record))
    return sorted(pairs, key=lambda p: (p[0], getattr(p[1], "inside", False)))


def collect_needs(cuts, cache, steering, site: str, n_layers: int) -> tuple[Need, ...]:
    """Needs inside this stack as (owner, Need with an absolute layer, or "*")."""
    found = []
    for cut in cuts:
        for need in needs_of(cut.transform):
            expect(f"need {need.name!r}", need.at, "'last' for a cut inside a layer", need.at != "next" or not cut.inside)
            at = f"{site}.{cut.layer - (not cut.inside)}" if need.at == "last" else need.at
            if at.startswith(f"{site}."):
                found.append(dataclasses.replace(need, at=absolute(at, n_layers)))
    for record in steering:
        found += [dataclasses.replace(n, at=absolute(n.at, n_layers)) for n in needs_of(record) if n.at.startswith(f"{site}.")]
    # A cache policy's needs are answered layer by layer, over own and cached keys: see stack._live_evidence.
    for need in needs_of(cache):
        expect("cache", need.at, f"needs at '{site}.*'", need.at == f"{site}.*")
    return tuple(dict.fromkeys(found))


def needs_of(record) -> tuple[Need, ...]:
    """What a record declared it has to see."""
    return tuple(record.needs()) if hasattr(record, "needs") else ()


def facts_of(program: Program, arrays: dict) -> dict:
    """{name: array} that transforms give to the row weights of their own Needs (optional ``facts(params)``): operands that
    decide what the tower is asked."""
    records = [("sites", site, record) for site, record in program.sites]
    records += [(site, cut.name, cut.transform) for site, stack in program.stacks for cut in stack.cuts]
    found: dict = {}
    for site, name, record in records:
        if hasattr(record, "facts"):
            found |= record.facts(params_of(subset(arrays, site), name))
    return found


def absolute(at: str, n_layers: int) -> str:
    """A Need's site with a layer number counted from the front."""
    site, layer = at.rsplit(".", 1)
    if layer == "*":
        return at
    number = int(layer)
    expect(f"need at {at}", number, f"a layer in [{-n_layers}, {n_layers})", -n_layers <= number < n_layers)
    return f"{site}.{number % n_layers}"


def params_of(arrays: dict, name: str) -> dict:
    """Operands and trained arrays of one bound record."""
    return {**arrays.get("operands", {}).get(name, {}), **arrays.get("trained", {}).get(name, {})}


def subset(arrays: dict, site: str) -> dict:
    """The arrays of one stack."""
    return {side: arrays.get(side, {}).get(site, {}) for side in ("operands", "trained")}
