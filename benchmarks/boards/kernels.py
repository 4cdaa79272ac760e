"""Every kernel operation beside its peers: what is called, with what work, in turns in one run.

A case is a shape of an operation; its contenders are our implementations, peers in JAX and peers in PyTorch. Calls take
turns, one of each per round, so that a slow second of the machine touches all of them; the figures are medians. Work is
counted from the shape: operations of the matrix products that a call must make, and bytes it must read and write once.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import jaxattn as ja
from benchmarks.boards.peers import BLOCK, Torch, block_lists
from jaxattn import masks
from jaxattn.core.types import expect
from pallas_kernels import indexer, profile

HEADS, WINDOW, ROWS, TABLE = 8, 1024, 128, 1 << 30  # TABLE: bytes of scores that a peer without tiles may write
ROUNDS, SHORT = 5, 2.0  # short calls get up to as many times the rounds, while their case has taken fewer seconds
OPS = ("flash", "gather", "linear", "profile", "indexer")


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape of an operation.

    program: f(arrays, implementation); arrays: its operands. flops, bytes: of one call. ideal: share of a dense call's
    work, for the ratio to dense peers. torch: {name: spec}; jax: {name: f(arrays)}; absent: {name: why}.
    """

    op: str
    shape: str
    program: Callable
    arrays: tuple
    flops: float
    bytes: float
    ideal: float = 1.0
    torch: dict[str, dict] = dataclasses.field(default_factory=dict)
    jax: dict[str, Callable] = dataclasses.field(default_factory=dict)
    absent: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Result:
    """Seconds of each round; ``error``: why there are none."""

    case: Case
    contender: str
    ours: bool
    seconds: tuple[float, ...]
    error: str | None = None

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


# ------------------------------------------------------------------------------------------------------------- cases


class Maker:
    """Operands on the devices of the mesh, heads cut over it."""

    def __init__(self, mesh, head_dim: int, dtype):
        self.mesh, self.d, self.dtype = mesh, head_dim, dtype
        self.rng = np.random.default_rng(0)

    def put(self, x, axis: int | None):
        names = [None] * x.ndim
        if axis is not None and x.shape[axis] % self.mesh.shape["tensor"] == 0:
            names[axis] = "tensor"
        return jax.device_put(x, NamedSharding(self.mesh, PartitionSpec(*names)))

    def rows(self, n: int, heads: int | None = None):
        return self.put(self.rng.standard_normal((1, n, heads or HEADS, self.d), np.float32).astype(self.dtype), 2)

    def lists(self, tiles: int, units: int, k: int, tile: int) -> ja.Selection:
        index = self.put(block_lists(HEADS, tiles, units, k)[None], 1)
        count = self.put(np.full(index.shape[:3], k, np.int32), 1)
        return ja.Selection(index, count, unit=BLOCK, tile=tile, distinct=True)

    def dense(self, n: int, m: int) -> dict:
        """Peers that attend all m keys: PyTorch's, and JAX's where its table of scores is not too large."""
        size = {"tokens": n, "keys": m, "heads": HEADS, "head_dim": self.d}
        found: dict[str, Any] = {"torch": {"torch sdpa": {"kind": "sdpa"} | size}, "jax": {}, "absent": {}}
        if jax.default_backend() == "gpu":
            found["jax"]["jax.nn cudnn"] = _jax_nn("cudnn")
            if importlib.util.find_spec("tokamax"):
                found["jax"]["tokamax"] = _tokamax
            else:
                found["absent"]["tokamax"] = "not installed"
        elif n * m * HEADS * 4 <= TABLE:
            found["jax"]["jax.nn"] = _jax_nn("xla")
        else:
            found["absent"]["jax.nn"] = f"its table of scores takes {n * m * HEADS * 4 / 2**30:.0f} GiB"
        return found

    def item(self) -> int:
        return jnp.dtype(self.dtype).itemsize


def _jax_nn(implementation: str) -> Callable:
    return lambda q, k, v, *_: jax.nn.dot_product_attention(q, k, v, implementation=implementation)


def _tokamax(q, k, v, *_):
    import tokamax

    return tokamax.dot_product_attention(q, k, v)


def _attend(q, k, v, where=None, *, implementation=None, mask=None):
    part = ja.attend(q, k, v, where=where, mask=mask, implementation=implementation)
    return part.out, part.lse


def flash_cases(make: Maker, tokens: int) -> list[Case]:
    """Random blocks at two densities, and a causal window."""
    found = []
    units, d = tokens // BLOCK, make.d
    for part in (8, 16):
        k = max(1, units // part)
        q, key, v = (make.rows(tokens) for _ in range(3))
        peers = make.dense(tokens, tokens)
        size = {"tokens": tokens, "keys": tokens, "heads": HEADS, "head_dim": d}
        peers["torch"]["torch flex, same blocks"] = {"kind": "flex blocks", "entries": k} | size
        work = 4 * tokens * k * BLOCK * d * HEADS
        moved = (2 * tokens + 2 * units * k * BLOCK) * d * HEADS * make.item()
        arrays = (q, key, v, make.lists(units, units, k, BLOCK))
        found.append(Case("flash", f"{tokens} tokens, 1/{part} of blocks", _attend, arrays, work, moved, k / units, **peers))
    if tokens > WINDOW:
        arrays = tuple(make.rows(tokens) for _ in range(3))
        seen = tokens * WINDOW - WINDOW * (WINDOW - 1) // 2
        program = functools.partial(_attend, mask=masks.causal() & masks.window(WINDOW))
        size = {"tokens": tokens, "keys": tokens, "heads": HEADS, "head_dim": d, "window": WINDOW}
        moved = 4 * tokens * d * HEADS * make.item()
        found.append(Case("flash", f"{tokens} tokens, causal window {WINDOW}", program, arrays, 4 * seen * d * HEADS, moved,
                          torch={"torch flex": {"kind": "flex window"} | size}))  # fmt: skip
    return found


def gather_cases(make: Maker, tokens: int) -> list[Case]:
    """One new query: all keys, and sixteen blocks of them."""
    keys, d, k = tokens * 8, make.d, 16
    q, key, v = make.rows(1), make.rows(keys), make.rows(keys)
    peers = make.dense(1, keys)
    few = make.dense(1, keys) | {"jax": {}, "absent": {}}
    per_key = 2 * d * HEADS * make.item()
    lists = make.lists(1, keys // BLOCK, k, 1)
    return [
        Case("gather", f"1 query, {keys} keys", _attend, (q, key, v), 4 * keys * d * HEADS, keys * per_key, **peers),
        Case("gather", f"1 query, {k} blocks of {keys} keys", _attend, (q, key, v, lists), 4 * k * BLOCK * d * HEADS,
             k * BLOCK * per_key, **few),
    ]  # fmt: skip


def linear_cases(make: Maker, tokens: int) -> list[Case]:
    """A decay per head, at a length and at eight times it."""
    found, d = [], make.d
    decay = make.put(-np.arange(1, HEADS + 1, dtype=np.float32) / HEADS, 0)
    for n in (tokens, 2 * tokens, 8 * tokens):
        arrays = (*(make.rows(n) for _ in range(3)), decay)
        # At 64K the dense call takes minutes on a CPU; the ratio is wanted at the middle length.
        peers = make.dense(n, n) if n == 2 * tokens else {}
        if jax.default_backend() == "gpu":
            size = {"tokens": n, "keys": n, "heads": HEADS, "head_dim": d}
            peers["torch"] = peers.get("torch", {}) | {"fla chunk_simple_gla": {"kind": "simple_gla"} | size}

        def program(q, k, v, decay, *, implementation=None):
            return ja.linear_attend(q, k, v, log_decay=decay, implementation=implementation)

        work = 4 * n * d * d * HEADS  # the recurrence alone; chunks do more
        moved = 4 * n * d * HEADS * make.item()
        found.append(Case("linear", f"{n} tokens, a decay per head", program, arrays, work, moved, **peers))
    return found


def profile_cases(make: Maker, tokens: int) -> list[Case]:
    """Vertical and slash mass of the last queries."""
    keys = tokens * 4

    def program(q, k, *, implementation=None):
        return profile.diagonals(q, k, implementation=implementation)

    arrays = (make.rows(ROWS), make.rows(keys))
    work, moved = 2 * ROWS * keys * make.d * HEADS, keys * make.d * HEADS * make.item()
    return [Case("profile", f"last {ROWS} rows, {keys} keys", program, arrays, work, moved)]


def indexer_cases(make: Maker, tokens: int) -> list[Case]:
    """Each of a few queries picks 64 of many units."""
    units, options = tokens * 8, indexer.Options(k=64, heads="sum", gate="relu")

    def program(q, k, *, implementation=None):
        valid = {"q_valid": jnp.ones((1, q.shape[1]), bool), "k_valid": jnp.ones((1, k.shape[1]), bool)}
        return indexer.select({"q": q, "k": k} | valid, options, implementation)

    arrays = (make.rows(ROWS), make.rows(units, 1))
    return [Case("indexer", f"{ROWS} queries, 64 of {units} units", program, arrays, 2 * ROWS * units * make.d * HEADS,
                 units * make.d * make.item())]  # fmt: skip


CASES = dict(zip(OPS, (flash_cases, gather_cases, linear_cases, profile_cases, indexer_cases), strict=True))


def cases(ops: Sequence[str], tokens: Sequence[int], mesh, head_dim: int, dtype) -> list[Case]:
    for op in ops:
        expect("ops", op, f"some of {', '.join(CASES)}", op in CASES)
    for n in tokens:
        expect("tokens", n, f"multiples of {2 * BLOCK}", n > 0 and n % (2 * BLOCK) == 0)
    make = Maker(mesh, head_dim, dtype)
    return [case for op in ops for n in tokens for case in CASES[op](make, n)]


# --------------------------------------------------------------------------------------------------------- measuring


def implementations() -> tuple[str, ...]:
    """Ours on this backend; "reference" is left out, because it writes tables."""
    return {"gpu": ("xla", "gpu"), "tpu": ("xla", "tpu")}.get(jax.default_backend(), ("xla",))


def measure(found: Sequence[Case], torch: Torch, repeats: int, say: Callable[[str], None] = print) -> list[Result]:
    """Results of every contender of every case, from ``repeats`` rounds or more; call it under ``jax.set_mesh``, so that
    heads are cut over the devices."""
    results = []
    for case in found:
        calls: dict[str, Callable | str] = {}
        for name in implementations():
            calls[name] = functools.partial(jax.jit(functools.partial(case.program, implementation=name)), *case.arrays)
        calls |= {name: functools.partial(jax.jit(f), *case.arrays) for name, f in case.jax.items()}
        calls |= {name: functools.partial(torch.seconds, spec) for name, spec in case.torch.items()}
        say(f"  {case.op}: {case.shape}")
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        errors = dict(case.absent)
        for turn in range(ROUNDS * repeats + 1):
            if turn <= 1:  # the first one compiles
                begun = time.perf_counter()
            if turn > repeats and time.perf_counter() - begun > SHORT:
                break
            for name in np.roll(list(calls), turn):
                if name in errors:
                    continue
                took = calls[name]() if name in case.torch else _clock(calls[name])
                if isinstance(took, str):
                    errors[name] = took
                elif turn:
                    seconds[name].append(took)
        ours = implementations()
        results += [Result(case, x, x in ours, tuple(seconds.get(x, ())), errors.get(x)) for x in {**seconds, **errors}]
    return results


def _clock(call: Callable) -> float | str:
    try:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start
    except (ValueError, RuntimeError, ImportError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"


def ceilings(mesh, dtype, repeats: int) -> dict[str, float]:
    """What this machine can do: {"flops": of a matrix product per second, "bytes": copied per second}, all devices."""
    parts = mesh.shape["tensor"]
    cut = NamedSharding(mesh, PartitionSpec("tensor"))
    n, m = (2048, 1 << 27) if jax.default_backend() == "cpu" else (8192, 1 << 30)
    a, big = jax.device_put(jnp.ones((parts, n, n), dtype), cut), jax.device_put(jnp.ones((m,), dtype), cut)
    product = jax.jit(jax.shard_map(lambda a: a @ a, mesh=mesh, in_specs=cut.spec, out_specs=cut.spec))
    copy = jax.jit(jax.shard_map(lambda x: x + 1, mesh=mesh, in_specs=cut.spec, out_specs=cut.spec))
    took: dict[str, list[float]] = {"flops": [], "bytes": []}
    for turn in range(repeats + 1):
        for name, call in (("flops", lambda: product(a)), ("bytes", lambda: copy(big))):
            seconds = _clock(call)
            if turn:
                took[name].append(seconds)
    work = {"flops": 2 * parts * n**3, "bytes": 2 * m * jnp.dtype(dtype).itemsize}
    return {name: work[name] / float(np.median(x)) for name, x in took.items()}


def memory(tokens: int, *, head_dim: int = 64, heads: int = HEADS, entries: int = 16) -> dict[str, int]:
    """Peak bytes of the compiled forward and backward of block-sparse attention: arguments, results and temporaries, from
    the compiler's own account. Nothing runs."""
    tiles = tokens // BLOCK
    shape = lambda dtype, *size: jax.ShapeDtypeStruct(size, dtype)  # noqa: E731
    q = shape(jnp.float32, 1, tokens, heads, head_dim)
    index, count = shape(jnp.int32, 1, heads, tiles, min(entries, tiles)), shape(jnp.int32, 1, heads, tiles)

    def forward(q, k, v, index, count):
        where = ja.Selection(index, count, unit=BLOCK, tile=BLOCK, distinct=True)
        return ja.attend(q, k, v, where=where, mask=masks.causal()).out

    def backward(*args):
        return jax.grad(lambda *x: forward(*x).sum(), (0, 1, 2))(*args)

    found = {}
    for name, f in (("forward", forward), ("backward", backward)):
        stats = jax.jit(f).lower(q, q, q, index, count).compile().memory_analysis()
        found[name] = int(stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes)
    return found
