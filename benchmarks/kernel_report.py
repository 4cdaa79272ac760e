"""What the compilers of TPU and GPU say about the kernels at full size: memory by kind, registers, spills.

    python -m benchmarks.kernel_report tpu                          # 128K tokens, every operation and chip generation
    python -m benchmarks.kernel_report tpu --ops flash --chips v6e --tokens 32768 --lists shared
    python -m benchmarks.kernel_report tpu --chips v5e --mesh       # cut over the four chips of a slice
    python -m benchmarks.kernel_report gpu --head-dim 64            # an H200
    python -m benchmarks.kernel_report gpu --ops flash --implementation hopper
    python -m benchmarks.kernel_report tpu --out results/kernels    # adds its rows to kernels.json, writes kernels.md again

Nothing runs: programs are compiled ahead of time from shapes (extras ``tpu-aot`` and ``gpu-aot``). A kernel that does not
fit its chip fails here as it would there. What is compiled: ``benchmarks/kernel_cases``.

Temporary memory of a program is what it holds besides its arguments and results. On TPU it is told twice: with arguments and
results in the layout that arrays have by default, where heads are arranged before tokens by copies, and with layouts that
the compiler is free to choose, as it is between the products of matrices of a model: then a transposition is no copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

from benchmarks.compile_report import show, topology  # first: it prepares the environment for compilers without chips

import jax  # isort: skip
import tyro  # isort: skip
from jax.experimental import topologies  # isort: skip
from jax.experimental.layout import Format, Layout  # isort: skip
from jax.extend import core  # isort: skip
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding  # isort: skip

import pallas_kernels  # isort: skip
from benchmarks import kernel_cases, kernel_page  # isort: skip
from pallas_kernels._compat import make_mesh  # isort: skip

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@dataclasses.dataclass(frozen=True)
class _Report(kernel_cases.Sizes):
    ops: tuple[str, ...] = dataclasses.field(default_factory=kernel_cases.names)
    """Operations to compile."""
    json: bool = False
    """Print one JSON array (bytes) instead of a table."""
    out: str | None = None
    """Keep the rows in OUT.json, beside those of other runs, and write all of them to OUT.md."""


@dataclasses.dataclass(frozen=True)
class Tpu(_Report):
    """Compile the operations, forward and backward, for one device of each chip."""

    chips: tuple[Literal["v5e", "v5p", "v6e", "tpu7x"], ...] = tuple(CHIPS)
    layouts: tuple[Literal["given", "free"], ...] = ("given", "free")
    """How arguments and results lie: as arrays do by default, or as the compiler likes."""
    mesh: bool = False
    """Cut the calls over all devices of a slice, queries in halves or more and heads in two, and report one device."""


@dataclasses.dataclass(frozen=True)
class Gpu(_Report):
    """Compile the operations, forward and backward, for an H200."""

    implementation: Literal["gpu", "hopper"] = "gpu"
    """Triton bodies, or those for Hopper alone, which not every operation has."""


@dataclasses.dataclass(frozen=True)
class Built:
    """A compiled program of an operation. ``kernels``: of a gradient, those that no program before it has. ``memory``:
    arguments, results, "temp" and "temp, layouts free" of the program as far as they were asked for."""

    name: str
    kernels: list
    memory: dict
    seconds: float


GRADIENTS = ("backward", "gradient")
TEMP = {"given": "temp", "free": "temp, layouts free"}


def build(op: str, sizes: kernel_cases.Sizes, sharding, implementation: str, layouts: tuple[str, ...] = ("given",)):
    """Compile the programs of an operation one by one, yielding each as ``Built``."""
    case = kernel_cases.load(op)
    floats, ints, programs = case.case(sizes, sharding, implementation)
    calls = [(name, f, (floats, ints)) for name, f in programs.items()]
    if getattr(case, "DIFFERENTIABLE", False):
        forward = programs["forward"]

        def backward(floats, ints, cotangents):  # the forward pass's results are results here, too, not temporaries
            out, pull = jax.vjp(lambda f: forward(f, ints), floats)
            return out, pull(cotangents)[0]

        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
        calls.append(("backward", backward, (floats, ints, jax.tree.map(place, jax.eval_shape(forward, floats, ints)))))
    seen = set()
    for name, f, args in calls:
        start = time.perf_counter()
        traced = jax.jit(f).trace(*args)
        memory = {}
        for layout in layouts:
            chosen = {}
            if layout == "free":
                chosen = {"in_shardings": Format(Layout.AUTO, sharding), "out_shardings": Format(Layout.AUTO)}
            found = jax.jit(f, **chosen).lower(*args).compile().memory_analysis()
            memory |= {"arguments": found.argument_size_in_bytes, "results": found.output_size_in_bytes}
            memory[TEMP[layout]] = found.temp_size_in_bytes
        seconds = time.perf_counter() - start
        found = {eqn.params["name"]: eqn for eqn in kernel_calls(traced.jaxpr.jaxpr)}
        if not found or not all(x.startswith(f"{op}_") for x in found):
            raise ValueError(f"{op}: expected kernels named {op}_..., got {sorted(found) or 'none'}")
        # A gradient runs the forward kernel, too; it has its row already.
        new = [eqn for x, eqn in found.items() if x not in seen or name not in GRADIENTS]
        seen |= set(found)
        yield Built(name, new, memory, round(seconds, 1))


def kernel_calls(jaxpr) -> list:
    """The kernels in a jaxpr, however deep."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("pallas_call", "mpmd_map"):
            found.append(eqn)
            continue
        for value in eqn.params.values():
            inner = value.jaxpr if isinstance(value, core.ClosedJaxpr) else value
            found += kernel_calls(inner) if isinstance(inner, core.Jaxpr) else []
    return found


def scalar_bytes(eqn) -> int:
    """Scalar memory of a kernel: its blocks twice, for the pipeline, and its scratch; rows are padded to 128 words."""
    refs = eqn.params["jaxpr"].invars
    blocks = len(eqn.invars) + len(eqn.outvars)
    total = 0
    for i, ref in enumerate(refs):
        if "smem" in str(ref.aval.memory_space).lower():
            *outer, last = ref.aval.shape
            total += (2 if i < blocks else 1) * math.prod(outer) * -(-last // 128) * 128 * 4
    return total


def nbytes(variables) -> int:
    return sum(math.prod(x.aval.shape) * x.aval.dtype.itemsize for x in variables)


def vector_bytes(eqn, sharding) -> int:
    """Vector memory of a kernel, register spills included, as its compiler reports it. Compiled alone: the text of a
    whole program cannot always be printed."""

    def alone(*arrays):
        return eqn.primitive.bind(*arrays, **eqn.params)

    shapes = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype, sharding=sharding) for x in eqn.invars]
    text = jax.jit(alone).lower(*shapes).compile().as_text()
    line = next(x for x in text.splitlines() if 'custom_call_target="tpu_custom_call"' in x)
    return int(re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"', line)[1])


def report(chip: str, options: Tpu) -> list[dict]:
    devices = topology(CHIPS[chip]).devices
    sharding = whole = SingleDeviceSharding(devices[0])
    mesh = make_mesh((len(devices) // 2, 2), ("sequence", "tensor"), devices=devices) if options.mesh else None
    if mesh is not None:
        whole = NamedSharding(mesh, PartitionSpec())
    rows = []
    for op in options.ops:
        with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
            programs = list(build(op, options, whole, "tpu", options.layouts))
        for built in programs:
            rows += [
                {
                    "op": op, "chip": chip, "program": built.name, "kernel": eqn.params["name"],
                    "VMEM": vector_bytes(eqn, sharding), "SMEM": scalar_bytes(eqn), "HBM in": nbytes(eqn.invars),
                    "HBM out": nbytes(eqn.outvars), **built.memory, "seconds": built.seconds,
                }
                for eqn in built.kernels
            ]  # fmt: skip
    return rows


def gpu_report(options: Gpu) -> list[dict]:
    nvcc = importlib.util.find_spec("nvidia.cuda_nvcc") if importlib.util.find_spec("jax_cuda12_plugin") else None
    if nvcc is None:
        raise SystemExit("gpu: expected the CUDA compiler (pip install 'jaxattn[gpu-aot]'), got an environment without it")
    root = Path(next(iter(nvcc.submodule_search_locations)))
    with tempfile.TemporaryDirectory() as dump:
        # Read when the first program is compiled.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={root} --xla_dump_to={dump}"
        os.environ |= {"MOSAIC_GPU_DUMP_TO": dump, "MOSAIC_GPU_DUMP_PTX": "1"}
        # Mosaic asks the first ptxas it finds which PTX to write: not that of a toolkit that happens to be installed.
        os.environ["PATH"] = f"{root / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
        target = (Path(pallas_kernels.__file__).parent / "targets" / "h200.txtpb").read_text()
        chip = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target).devices[0]
        rows = []
        for op in options.ops:
            for built in build(op, options, SingleDeviceSharding(chip), options.implementation):
                names = {eqn.params["name"] for eqn in built.kernels}
                for figures in gpu_kernels(Path(dump), root, names):
                    rows.append({"op": op, "program": built.name, **figures, **built.memory, "seconds": built.seconds})
                for file in Path(dump).iterdir():
                    file.unlink()
    return rows


def gpu_kernels(dump: Path, root: Path, names: set[str]) -> list[dict]:
    """Figures of the kernels called ``names``, from what a compilation left in ``dump``."""
    shared = {}
    for plan in dump.glob("*thunk_sequence.txt"):
        for name, size in re.findall(r"(\w+) grid: .*shared_memory: (\d+) bytes", plan.read_text()):
            shared[name] = int(size)
    for passes in dump.glob("*.mlir-passes.log"):  # of Mosaic: the plan does not show it
        size = re.search(r"dynamic_shared_memory_size %c(\d+)", passes.read_text())
        shared[re.sub(r"_\d+$", "", passes.name.removesuffix(".mlir-passes.log"))] = int(size[1])
    rows = []
    for path in sorted(dump.glob("*.ptx")):
        name = re.search(r"\.entry (\w+)", text := path.read_text())
        kernel = name and name[1].removesuffix("_mosaic_gpu_kernel")
        if kernel not in names:
            continue
        command = [root / "bin" / "ptxas", "-v", "-arch=sm_90a", path, "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        rows.append({
            "kernel": kernel, "registers": int(re.search(r"Used (\d+) registers", log)[1]),
            "spills": int(spills[1]) + int(spills[2]), "shared memory": shared[kernel],
            "wgmma": text.count("wgmma.mma_async"), "mma": text.count("mma.sync"), "tma": text.count("cp.async.bulk.tensor"),
        })  # fmt: skip
    if missing := names - {row["kernel"] for row in rows}:
        raise ValueError(f"gpu: expected PTX of {', '.join(sorted(missing))}, the compiler wrote none")
    return rows


def main() -> None:
    choice = Annotated[Tpu, tyro.conf.subcommand("tpu")] | Annotated[Gpu, tyro.conf.subcommand("gpu")]
    options = tyro.cli(choice, description=__doc__.split("\n\n")[0])
    try:
        for op in options.ops:
            kernel_cases.load(op)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    gpu = isinstance(options, Gpu)
    rows = []
    for part in [options] if gpu else [dataclasses.replace(options, chips=(chip,)) for chip in options.chips]:
        found = gpu_report(part) if gpu else report(part.chips[0], part)
        rows += found
        if options.out:
            kernel_page.keep(Path(options.out), "gpu" if gpu else "tpu", part, found)
    if options.json:
        print(json.dumps(rows))
        return
    columns = tuple(rows[0])
    show(columns, [tuple(kernel_page.text(x, row[x]) for x in columns) for row in rows])


if __name__ == "__main__":
    main()
