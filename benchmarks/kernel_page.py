"""The page of what ``benchmarks.kernel_report`` found: rows of many runs kept in one JSON file, tables made of all of them."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
from pathlib import Path

SIZES = ("tokens", "heads", "kv_heads", "head_dim", "block", "entries", "lists", "decay", "implementation")
KEY = ("target", *SIZES, "op", "chip", "program", "kernel")
KIB, MIB = ("VMEM", "SMEM", "shared memory"), ("HBM in", "HBM out", "arguments", "results", "temp", "temp, layouts free")

TPU = ("op", "decay", "chip", "program", "kernel", "VMEM", "SMEM", "HBM in", "HBM out", "temp", "temp, layouts free")
GPU = ("op", "decay", "body", "program", "kernel", "registers", "spills", "shared memory", "wgmma", "mma", "tma")


def text(column: str, value) -> str:
    if value is None:
        return ""
    for names, size, unit in ((KIB, 2**10, "KiB"), (MIB, 2**20, "MiB")):
        if column in names:
            return f"{value / size:,.0f} {unit}"
    return str(value)


def keep(path: Path, target: str, options, rows: list[dict]) -> None:
    """Add rows to ``path``.json, in place of those of the same kernel and sizes, and write ``path``.md again."""
    file = path.with_name(path.name + ".json")
    kept = json.loads(file.read_text()) if file.exists() else []
    known = {x: a for x, a in dataclasses.asdict(options).items() if x in SIZES}
    found = {_key(row): row for row in kept}
    for row in rows:
        row = {"target": target, "date": str(datetime.date.today()), **versions(target)} | known | row
        found[_key(row)] = row
    rows = sorted(found.values(), key=lambda row: [str(x).zfill(9) for x in _key(row)])
    path.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows, indent=1) + "\n")
    path.with_name(path.name + ".md").write_text(page(rows))


def versions(target: str) -> dict:
    packages = {"tpu": ("jax", "libtpu"), "gpu": ("jax", "nvidia-cuda-nvcc-cu12")}[target]
    return {"versions": " ".join(f"{x} {importlib.metadata.version(x)}" for x in packages)}


def _key(row: dict) -> tuple:
    return tuple(row.get(x) for x in KEY)


INTRODUCTION = """# The kernels, what the compilers say

Compiled ahead of time ({versions}; {dates}); nothing ran on a device. Calls in bfloat16, batch 1, {heads} query and {kv_heads}
kv heads: causal block lists ({entries} units of {block} keys per list) for flash and profile, token lists of 2,048 of all keys
for gather and indexer, a recurrence with the decay named. `python -m benchmarks.kernel_report {{tpu,gpu}} --out FILE` adds
rows and writes this page. HBM in and out are a kernel's operands and results. Arguments, results and temp are a whole
program's: temp is what it holds besides the other two. A backward program runs the forward kernel, too, and returns its
results; its rows leave that kernel out.
"""
LAYOUTS = """Temp is told with arguments and results as arrays lie by default (heads after tokens: the kernels' order is made by
copies), and with layouts free: the compiler chooses them, as it does between the matrix products of a model, and a
transposition is no copy. What is left then: flash and profile hold their lists, the same lists by unit, and sums per row;
gather, one kv head at a time, packs k and v of a key into one row, so that a token is one copy, and sums the gradients of
keys in float32; linear and indexer hold next to nothing.
"""


def page(rows: list[dict]) -> str:
    tpu, gpu = ([r for r in rows if r["target"] == x] for x in ("tpu", "gpu"))
    every = {x: every_of(rows, x) for x in ("versions", "heads", "kv_heads", "entries", "block")}
    parts = [INTRODUCTION.format(dates=every_of(rows, "date"), **every)]
    if tpu:
        longest = max(r["tokens"] for r in tpu)
        whole = [r for r in tpu if r["tokens"] == longest]
        title = f"## TPU, {longest // 1024}K tokens, heads of {every_of(whole, 'head_dim')}\n"
        parts += [title, LAYOUTS, table(TPU, whole)]
    for title, found, column in (("TPU, layouts free", tpu, "temp, layouts free"), ("H200", gpu, "temp")):
        if lengths := by_length(found, column):
            parts += [f"## Memory by length: {title}\n", lengths]
    for tokens in sorted({r["tokens"] for r in gpu}):
        for dim in sorted({r["head_dim"] for r in gpu}):
            some = [r for r in gpu if (r["tokens"], r["head_dim"]) == (tokens, dim)]
            if some:
                parts += [f"## H200, {tokens // 1024}K tokens, heads of {dim}\n", table(GPU, some)]
    return "\n".join(parts)


def every_of(rows: list[dict], column: str) -> str:
    return ", ".join(sorted({str(r[column]) for r in rows}))


def by_length(rows: list[dict], column: str) -> str:
    """One line per program that was compiled for several lengths."""
    found = {}
    for r in rows:
        if r.get(column) is not None:
            name = (*(shown(r, x) for x in ("op", "decay", "body", "head_dim", "program", "chip")),)
            figures = r["arguments"] + r["results"], r[column]
            found.setdefault(name, {})[r["tokens"]] = " + ".join(f"{x / 2**20:,.0f}" for x in figures) + " MiB"
    found = {name: at for name, at in found.items() if len(at) > 1}
    lengths = sorted({n for at in found.values() for n in at})
    head = ("op", "decay", "body", "head size", "program", "chip", *(f"{n // 1024}K" for n in lengths))
    lines = [[*name, *(at.get(n, "") for n in lengths)] for name, at in found.items()]
    used = [i for i in range(len(head)) if any(line[i] for line in lines)]
    if not lines:
        return ""
    picked = [[line[i] for i in used] for line in (list(head), *lines)]
    return "Arguments and results + temp.\n\n" + markdown(picked[0], picked[1:])


def shown(row: dict, column: str) -> str:
    if column == "decay":
        return row["decay"] if row["op"] == "linear" else ""
    if column == "body":
        return {"hopper": "Mosaic GPU", "gpu": "Triton"}.get(row.get("implementation", ""), "")
    return text(column, row.get(column))


def table(columns, rows: list[dict]) -> str:
    columns = [c for c in columns if any(shown(r, c) for r in rows)]
    return markdown(columns, [[shown(r, c) for c in columns] for r in rows])


def markdown(head, lines) -> str:
    line = lambda cells: "| " + " | ".join(cells) + " |"  # noqa: E731
    return "\n".join([line(head), line(["---"] * len(head)), *map(line, lines)]) + "\n"
