"""Training of methods that have parts of their own inside a model that is trained already.

    python -m train vit --init runs/vit --out runs/slim --tokens NAME:arg=value [NAME@vision.2 ...]
    python -m train vlm --init runs/demo --out runs/slim --tokens NAME --tokens-at project

How a method plugs in, nothing of which this folder knows by name:

* Its record has ``init(key, spec) -> dict``. The binding makes these arrays and hands them to ``apply`` in ``params``; they
  are the entry SOCKETS of what is trained and saved, by site ("cut.0" or, between the stacks, {"sites": {...}}).
* In training ``ctx.phase`` is "train" and ``ctx.key`` a key of the step: a method that draws (a budget, a ratio) folds it in.
  Evaluations run with phase "prefill", as inference does.
* What its loss needs and only ``apply`` knows is the third thing that ``apply`` returns, a dict: the Outcome's ``aux``.
* An Objective registered under the method's name (or given by --objective) replaces the task's loss; without one the task's
  own loss is trained. Its ``loss(params, state, forward, batch, key)`` gets ``forward(batch) -> Outcome`` of the model with
  the method, ``params``: its own parts beside "method", the method's; ``state.shared``: the Outcome of the model without
  the method at the weights of --init, where the objective says ``teacher = True``. Optional ``needs()``, ``init``, ``rates``:
  see ``jaxattn.core.types.Objective``. A Need at "vision.*" or "llm.*" is answered as evidence["name.0"], ["name.1"], ...,
  by layer, so that numbers of rows may differ.

A run that ends has everything in its checkpoint; ``train.tasks.load(folder)`` gives it back as a bound model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxattn import registry
from jaxattn.core.types import Array, State, data, expect
from models import evidence as ev
from models.bind import Bound, Program, absolute
from train.checkpoints import load_params
from train.sharding import path_name
from train.tuning import SOCKETS

OBJECTIVE, TEACHER = "objective", "teacher"  # entries of the parameters: parts that only training has; the frozen model
PARTS = (SOCKETS, OBJECTIVE)  # entries that a run to start from may lack


@data
class Outcome:
    """What a model made of a batch.

    loss: of the task, scalar.  metrics: scalars.  logits: float32 [B, T, V]; weight: [B, T], of the rows that count.
    evidence: what the method and the objective asked to see, of the visual rows.  aux: {site: {record: what it told}},
    sites "vision" and "llm" (records "cut.0", ...) and "sites" (records "vision", "project").  rows: {"vision": Streams,
    "llm": Streams}, the rows that leave each stack, before the last norm; "head": those that a classifier reads, behind it.
    """

    loss: Array
    metrics: dict[str, Array]
    logits: Array
    weight: Array
    evidence: dict[str, Array]
    aux: dict[str, Any]
    rows: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a Stage needs: loss functions (params, batch, key), all that is trained and saved, what they read besides, and
    factors on the learning rate."""

    loss_fn: Callable
    eval_loss: Callable
    params: dict
    frozen: dict
    groups: dict[str, float]


# --------------------------------------------------------------------------------------------------- the command line
def placed(tokens: tuple[str, ...], default: str) -> dict[str, str]:
    """{site: method} of methods "name:arg=value@site"."""
    found: dict[str, str] = {}
    for text in tokens:
        method, _, site = text.rpartition("@") if "@" in text else (text, "", default)
        expect("tokens", text, f"one method at {site!r}", site not in found)
        found[site] = method
    return found


def objective_of(given: str | None, methods: tuple[str, ...]):
    """The Objective named on the command line, or the one registered under a method's name; None: the task's own loss."""
    if given is not None:
        return registry.parse("objective", given)
    names = {text.partition(":")[0].strip().replace("-", "_") for text in methods}
    named = sorted(names & set(registry.names("objective")))
    expect("objective", ", ".join(named), "one to be named: several methods have their own", len(named) < 2)
    return registry.parse("objective", named[0]) if named else None


# ------------------------------------------------------------------------------------------------------ where it starts
def checkpoints(run: Path) -> Path:
    """The folder of checkpoints of a run, which may be named itself."""
    return run / "checkpoints" if (run / "checkpoints").is_dir() else run


def shaped(config, record: Mapping[str, Any]):
    """A configuration with the shape of the run it starts from; another one asked for is an error."""
    before = record.get("config") or {}
    expect("init", before.get("task"), f"a run of the task {config.task!r}", before.get("task") == config.task)
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    for name in config.shape:
        asked, had = getattr(config, name), before.get(name, defaults[name])
        expect(name, asked, f"{had} as the run of --init has, or nothing", asked in (had, defaults[name]))
    return dataclasses.replace(config, **{name: before.get(name, defaults[name]) for name in config.shape})


def filled(params: dict, found: Mapping[str, Any]) -> dict:
    """``params`` with the leaves that a run has: all of the model's, and those of parts it was trained with."""
    names = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(dict(found))}
    fresh = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for name, leaf in names.items():
        if name.split("/")[0] == OBJECTIVE and name not in fresh:
            continue  # of another objective
        got = "nothing of that name" if name not in fresh else list(fresh[name].shape)
        expect(f"init: {name}", got, f"{list(leaf.shape)}, the run's", name in fresh and fresh[name].shape == leaf.shape)
    lacking = [name for name in fresh if name not in names and name.split("/")[0] not in PARTS]
    expect("init", f"a run without {', '.join(lacking[:3])}", "one with all of the model's parameters", not lacking)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: names.get(path_name(path), leaf), params)


def load(run: Path) -> tuple[dict, dict]:
    """(parameters, record) of a run."""
    return load_params(checkpoints(Path(run)))


# ------------------------------------------------------------------------------------------------------- what is trained
def of_patches(program: Program, *outs) -> dict[str, Array]:
    """What passes of a vision tower showed (None: did not run), told of its patches alone."""
    needs, found = {need.name: need for need in program.stack("vision").needs}, {}
    for out in outs:
        if out is not None:
            start, stop = out.streams.span("vision")
            # Patches come last, and there may have been more of them where a fact was found.
            stop = None if stop == out.streams.x.shape[1] else stop
            found |= {name: ev.columns(needs[name], x, start, stop) for name, x in out.evidence.items() if name in needs}
    return found


def seeing(bound: Bound, objective) -> Bound:
    """The bound model that also shows what an objective asks for, every layer under a name of its own."""
    needs = tuple(objective.needs()) if hasattr(objective, "needs") else ()
    stacks = []
    for site, stack in bound.program.stacks:
        mine = []
        for need in needs:
            family, _, layer = need.at.partition(".")
            if family == site and layer == "*":
                mine += [dataclasses.replace(need, name=f"{need.name}.{i}", at=f"{site}.{i}") for i in range(stack.layers)]
            elif family == site:
                mine.append(dataclasses.replace(need, at=absolute(need.at, stack.layers)))
        stacks.append((site, dataclasses.replace(stack, needs=tuple(dict.fromkeys((*stack.needs, *mine))))))
    return bound._replace(program=dataclasses.replace(bound.program, stacks=tuple(stacks)))


def prepare(student: Callable, teacher: Callable, params: dict, objective, batch: Mapping[str, np.ndarray], *, key,
            groups: Mapping[str, float], trained: bool) -> Plan:  # fmt: skip
    """The training of a model's parameters ``params`` by an objective (None: the task's own loss).

    Args:
      student, teacher: (params, batch, key, phase) -> Outcome of the model with and without the method.
      batch: any, for the shapes.  groups: factors on learning rates.  trained: whether params come from a run.
    """
    wants = getattr(objective, "teacher", False)
    expect("init", "none", "a run: the objective compares with the model without the method", trained or not wants)
    rates = {"model": 1.0, "method": 1.0, "objective": 1.0, **getattr(objective, "rates", {})}
    model = {name: tree for name, tree in params.items() if name not in PARTS}
    if hasattr(objective, "init"):
        @jax.jit  # traced: only the outcomes' shapes are read, so nothing of the models is computed
        def parts(key, params, batch):
            shown = student(params, batch, key, "train")
            return objective.init(key, shown, teacher(params, batch, None, "train") if wants else None)

        params = {**params, OBJECTIVE: parts(key, params, dict(batch))}
    still = tuple(model) if rates["model"] == 0 else ()

    def loss(params, batch, key, phase):
        params = dict(params)
        reference = params.pop(TEACHER, None)
        own = params.pop(OBJECTIVE, {})
        params |= {name: jax.lax.stop_gradient(params[name]) for name in still}
        forward = lambda batch: student(params, batch, key, phase)  # noqa: E731
        if objective is None:
            out = forward(batch)
            return out.loss, out.metrics
        shown = () if reference is None else jax.lax.stop_gradient(teacher(reference, batch, None, phase))
        given = {**own, "method": params.get(SOCKETS, {})}
        return objective.loss(given, State(shared=shown), forward, batch, key)

    factors = {name: rates["model"] for name in model if rates["model"] != 1}
    factors |= {prefix: rates["model"] * f for prefix, f in groups.items()}
    factors |= {entry: rates[kind] for entry, kind in ((SOCKETS, "method"), (OBJECTIVE, "objective")) if entry in params}
    factors = {} if set(factors.values()) == {1.0} else factors
    return Plan(lambda params, batch, key: loss(params, batch, key, "train"),
                lambda params, batch, key: loss(params, batch, key, "prefill"),
                params, {TEACHER: model} if wants else {}, factors)  # fmt: skip
