"""Sizes of a kernel, measured on the device at hand and written where its body looks them up (``pallas_kernels/tuned``).

    python -m benchmarks tune --op flash --implementation xla
    python -m benchmarks tune --op flash --implementation gpu --head-dims 64 128 --tokens 32768

Candidates are compiled one by one, and those the compiler refuses (registers that spill, too much memory on the chip) are
out; the rest run in turns, so that a slow minute of the machine touches all of them. A candidate takes the place of the
shipped sizes if its median is faster by ``gain``.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import statistics
import time
from pathlib import Path
from typing import Literal

import jax

from benchmarks import kernel_cases
from pallas_kernels import _tuned

SPILLS = "--xla_gpu_fail_ptx_compilation_on_register_spilling=true"


@dataclasses.dataclass(frozen=True)
class Tune:
    """Measure the sizes of a kernel on this machine and keep the best."""

    op: str = "flash"
    implementation: Literal["xla", "tpu", "gpu"] = "xla"
    head_dims: tuple[int, ...] = (64, 128)
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    tokens: int = 4096
    heads: int = 8
    kv_heads: int = 8
    entries: int = 16
    """Units in a list, for the kernels."""
    repeats: int = 5
    gain: float = 0.03
    """Share of the time that a candidate must save."""
    out: Path | None = None
    """File to write; None: this chip's in pallas_kernels/tuned."""


def run(options: Tune) -> int:
    from benchmarks.compile_report import show  # late: it prepares the process for compilers without chips

    if options.implementation == "gpu":  # read when the first program is compiled
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {SPILLS}"
    case = kernel_cases.load(options.op)
    if not hasattr(case, "tuning"):
        raise ValueError(f"op: expected one that can be tuned, got {options.op!r}")
    rows = []
    for head_dim in options.head_dims:
        sizes = kernel_cases.Sizes(options.tokens, options.heads, options.kv_heads, head_dim, entries=options.entries)
        for dtype in options.dtypes:
            for one in case.tuning(sizes, dtype, options.implementation):
                found = measure(options, one)
                rows += [(one.shape, one.dtype, *row) for row in found.rows]
                if found.best is not None:
                    _tuned.write(entry(options, one, found), options.out)
    show(("shape", "dtype", "sizes", "ms", ""), rows)
    return 0


@dataclasses.dataclass(frozen=True)
class Found:
    """Rows to print, and (sizes, seconds) of the best candidate or None if the shipped sizes stay."""

    rows: list[tuple]
    shipped: float
    best: tuple[dict[str, int], float] | None


def measure(options: Tune, one: kernel_cases.Tunable) -> Found:
    """Compile and time every candidate of ``one``, the shipped sizes first."""
    compiled, rows = {}, []
    for i, sizes in enumerate(({}, *one.candidates)):
        with _tuned.trying(options.op, options.implementation, one.shape, one.dtype, sizes):
            try:
                program = jax.jit(lambda *args: one.program(*args)).lower(*one.args).compile()
                jax.block_until_ready(program(*one.args))
            except (RuntimeError, ValueError) as error:  # what compilers and lowering rules raise
                if i == 0:
                    raise
                rows.append((name(sizes), "", f"refused: {str(error).splitlines()[0][:60]}"))
                continue
        compiled[i] = sizes, program, []
    for _ in range(options.repeats):
        for _, program, seconds in compiled.values():
            start = time.perf_counter()
            jax.block_until_ready(program(*one.args))
            seconds.append(time.perf_counter() - start)
    medians = {i: statistics.median(seconds) for i, (_, _, seconds) in compiled.items()}
    first = min(medians, key=medians.get)
    wins = medians[first] < (1 - options.gain) * medians[0]
    best = (compiled[first][0], medians[first]) if wins else None
    mark = {first: "best, kept" if wins else "best, too close"} | ({} if wins else {0: "stays"})
    rows = [(name(compiled[i][0]), f"{medians[i] * 1e3:.2f}", mark.get(i, "")) for i in compiled] + rows
    return Found(rows, medians[0], best)


def name(sizes: dict[str, int]) -> str:
    return ", ".join(f"{k} {v}" for k, v in sizes.items()) or "shipped"


def entry(options: Tune, one: kernel_cases.Tunable, found: Found) -> dict:
    sizes, seconds = found.best
    key = dict(zip(_tuned.KEYS, (options.op, options.implementation, one.shape, one.dtype), strict=True))
    return key | {
        "sizes": sizes, "milliseconds": round(seconds * 1e3, 3), "shipped milliseconds": round(found.shipped * 1e3, 3),
        "tokens": options.tokens, "heads": options.heads, "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
