"""The board of the kernels: every operation, implementation and shape beside its peers, in one run on this machine."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.boards import kernels as board
from benchmarks.boards.peers import Torch
from models.cores import heads_mesh, one_device_per_core

LEGEND = (
    "Calls of one shape take turns; times are medians over the rounds (up to five times as many where calls are short), with "
    "the fastest and the slowest.",
    "ratio: time of this contender over ours (above 1 we are faster). of ideal: dense time x share of the work / our time.",
    "GFLOP/s and GB/s count the products a call must make and the bytes it must move once; the percentages are of this "
    "machine's ceilings, a matrix product and a copy on all devices in the same run. Dense peers do all the work, so theirs "
    "is counted whole.",
)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Time every kernel operation beside its peers: a table, a picture and the figures as JSON."""

    ops: tuple[Literal["flash", "gather", "linear", "profile", "indexer"], ...] = board.OPS
    tokens: tuple[int, ...] = (8192,)
    """Lengths of flash calls; decoding reads eight times as many keys, linear runs at one, two and eight times as many."""
    head_dim: int = 64
    repeats: int = 5
    """Rounds after the first, which compiles; short calls get more."""
    memory: tuple[int, ...] = (32768, 65536, 131072)
    """Lengths whose memory is looked up in the compiled programs; none is run."""
    out: Path = Path("benchmarks/results")
    """Folder of the files, whose names carry the platform and the date, and a CPU's one device, which nobody asks for but
    ``JAX_NUM_CPU_DEVICES=1``."""


def run(options: Kernels) -> int:
    """Measure and write; returns the exit status."""
    one_device_per_core()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a peer process shares the accelerator
    backend = jax.default_backend()
    mesh, dtype = heads_mesh(), jnp.float32 if backend == "cpu" else jnp.bfloat16
    found = board.cases(options.ops, options.tokens, mesh, options.head_dim, dtype)
    with jax.set_mesh(mesh), Torch("cuda" if backend == "gpu" else "cpu") as torch:
        before = board.ceilings(mesh, dtype, options.repeats)
        results = board.measure(found, torch, options.repeats)
        after = board.ceilings(mesh, dtype, options.repeats)
    with jax.set_mesh(mesh):
        held = {n: board.memory(n, head_dim=options.head_dim) for n in options.memory}
    record = {
        "date": datetime.date.today().isoformat(), "backend": backend, "device": jax.devices()[0].device_kind,
        "machine": platform.processor() or platform.machine(), "devices": jax.device_count(), "dtype": jnp.dtype(dtype).name,
        "jax": jax.__version__, "heads": board.HEADS, "head_dim": options.head_dim, "repeats": options.repeats,
        "ceilings": {x: [before[x], after[x]] for x in before}, "results": [_entry(r, results) for r in results],
        "memory": {str(n): x for n, x in held.items()},
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    alone = "-one-device" if backend == "cpu" and jax.device_count() == 1 else ""
    path = options.out / f"kernels-{backend}{alone}-{record['date']}"
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(record))
    picture(record, path.with_suffix(".png"))
    print(markdown(record))
    print(f"written: {path}.md, .json, .png")
    return 0


def _entry(r: board.Result, results: Sequence[board.Result]) -> dict[str, Any]:
    """A result as plain data, beside our first implementation of its case."""
    case = r.case
    entry: dict[str, Any] = {"op": case.op, "shape": case.shape, "contender": r.contender, "ours": r.ours}
    if r.error is not None:
        return entry | {"error": r.error}
    dense = r.contender in ("torch sdpa", "jax.nn", "jax.nn cudnn", "tokamax") and case.op == "flash"
    share = case.ideal if dense else 1.0
    entry |= {"ms": 1e3 * r.median, "least": 1e3 * min(r.seconds), "most": 1e3 * max(r.seconds)}
    entry |= {"flops": case.flops / share / r.median, "bytes": case.bytes / r.median}
    ours = next((x for x in results if x.case is case and x.ours and x.error is None), None)
    if ours is not None and not r.ours:
        entry["ratio"] = r.median / ours.median
        if dense:
            entry["of_ideal"] = share * r.median / ours.median
    return entry


def markdown(record: dict[str, Any]) -> str:
    """The record as a page."""
    best = {x: max(values) for x, values in record["ceilings"].items()}
    lines = [
        f"# Kernels on {record['device']}, {record['date']}",
        "",
        f"{record['devices']} devices ({record['machine']}), {record['dtype']}, {record['heads']} heads of "
        f"{record['head_dim']}, JAX {record['jax']}, {record['repeats']} rounds. Ceilings: {best['flops'] / 1e9:.0f} GFLOP/s "
        f"(matrix product), {best['bytes'] / 1e9:.1f} GB/s (copy).",
        "",
        "| op | shape | contender | ms | least - most | ratio | of ideal | GFLOP/s | % | GB/s | % |",
        "| :-- | :-- | :-- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for e in record["results"]:
        name = f"**jaxattn {e['contender']}**" if e["ours"] else e["contender"]
        head = f"| {e['op']} | {e['shape']} | {name} |"
        if "error" in e:
            lines.append(f"{head} absent: {e['error']} | | | | | | | |")
            continue
        optional = " | ".join(f"{e[x]:.2f}" if x in e else "" for x in ("ratio", "of_ideal"))
        lines.append(
            f"{head} {e['ms']:.2f} | {e['least']:.2f} - {e['most']:.2f} | {optional} | {e['flops'] / 1e9:.1f} | "
            f"{100 * e['flops'] / best['flops']:.0f} | {e['bytes'] / 1e9:.2f} | {100 * e['bytes'] / best['bytes']:.0f} |"
        )
    if record["memory"]:
        lines += [
            "",
            "Memory of block-sparse causal attention (16 blocks of 128 keys per tile; arguments, results and temporaries of "
            "the compiled program, MiB per device):",
            "",
            "| tokens | forward | backward |",
            "| --: | --: | --: |",
        ]
        lines += [f"| {n} | {x['forward'] / 2**20:.0f} | {x['backward'] / 2**20:.0f} |" for n, x in record["memory"].items()]
    return "\n".join([*lines, "", *LEGEND, ""])


def picture(record: dict[str, Any], path: Path) -> None:
    """Times of every contender, a panel per shape (PNG)."""
    from benchmarks.boards import plots

    shapes = list(dict.fromkeys((e["op"], e["shape"]) for e in record["results"] if "ms" in e))
    columns = min(3, len(shapes))
    rows = -(-len(shapes) // columns)
    figure = plots.blank(4.2 * columns, 2.2 * rows)
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for panel, (op, shape) in zip(panels, shapes, strict=False):
        entries = [e for e in record["results"] if (e["op"], e["shape"]) == (op, shape) and "ms" in e][::-1]
        colours = [plots.COLOURS[1] if e["ours"] else plots.COLOURS[0] for e in entries]
        bars = panel.barh([e["contender"] for e in entries], [e["ms"] for e in entries], color=colours)
        panel.bar_label(bars, labels=[f"{e['ms']:.3g}" for e in entries], padding=2, fontsize=7)
        panel.set_title(f"{op}: {shape}", fontsize=8)
        panel.set_xlabel("ms", fontsize=7)
        panel.margins(x=0.2)
        panel.tick_params(labelsize=7)
    for panel in panels[len(shapes) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=120)
