"""What compilers say about the models' programs: time against depth, memory of a step, a large model on a large mesh.

    python -m benchmarks.compile_report layers               # compile time of 8 and 32 layers
    python -m benchmarks.compile_report decode --target tpu  # temporary memory of a decoding step
    python -m benchmarks.compile_report train-8b             # an 8B training step for 128 TPU chips
    python -m benchmarks.compile_report serve-8b             # 128K tokens read and continued by an 8B model on 8 TPU chips

Nothing runs and no array of a model is allocated: programs are lowered from shapes. TPU targets need the extra
``tpu-aot``.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

# Before jax starts: programs are compiled here, and TPU's compiler must not look for a machine that is not there.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import tyro  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.extend import core  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from jaxattn import cache, linear, tokens  # noqa: E402
from jaxattn.core.rope import Rope, RopeScaling  # noqa: E402
from models import by_layer, dense, llm, stack  # noqa: E402
from models.bind import Bound, as_record, bind_stack, subset  # noqa: E402
from models.bind import Program as ModelProgram  # noqa: E402
from train.loop import make_step  # noqa: E402
from train.optim import make_optimizer  # noqa: E402
from train.sharding import batch_shardings, make_mesh, replicated, shardings  # noqa: E402
from train.tasks import language_loss  # noqa: E402

generation = importlib.import_module("models.generate")  # models.generate is the function
PHASES = ("train", "prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Program:
    """A function, the shapes of its arguments, and which of them its result may overwrite."""

    call: Callable
    args: tuple
    donate: tuple[int, ...] = ()

    def trace(self):
        return jax.jit(self.call, donate_argnums=self.donate).trace(*self.args)


def shapes(tree: Any, sharding=None) -> Any:
    """ShapeDtypeStructs of arrays, numpy values or shapes; ``sharding`` for all of them."""

    def one(x):
        x = x if hasattr(x, "dtype") else jnp.asarray(x)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(one, tree)


def size(tree: Any) -> int:
    """Bytes of a tree of shapes (keys of random numbers not counted)."""
    leaves = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.extended)]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def equations(jaxpr) -> int:
    """Equations of a jaxpr and of every jaxpr inside it."""
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    is_jaxpr = lambda x: isinstance(x, (core.Jaxpr, core.ClosedJaxpr))  # noqa: E731
    inner = [x for e in jaxpr.eqns for x in jax.tree.leaves(list(e.params.values()), is_leaf=is_jaxpr) if is_jaxpr(x)]
    return len(jaxpr.eqns) + sum(equations(x) for x in inner)


# ------------------------------------------------------------------------------------------------ time against depth


@dataclasses.dataclass(frozen=True)
class Layers:
    """Time to trace, lower and compile a language model of each depth, cold, on the CPU."""

    depths: tuple[int, ...] = (8, 32)
    dim: int = 256
    length: int = 256
    """Tokens of text; as many visual rows stand in front."""
    repeats: int = 3
    """The median is taken."""
    json: bool = False
    """Print one JSON object instead of a table."""


def depth_programs(depth: int, *, dim: int = 256, length: int = 256, sockets: bool = False) -> dict[str, Program]:
    """{phase: Program} of a language model that reads ``length`` visual and as many text rows.

    ``sockets``: three token drops, and a plan of two attentions (every fourth layer dense, the others linear)."""
    c = llm.config(1024, depth, dim, 8, kv_heads=2, hidden=2 * dim)
    plan = by_layer((dense(), linear.lightning_attention()), tuple(int(i % 4 != 3) for i in range(depth)))
    drops = {str(depth * i // 4): tokens.uniform(keep=length * (4 - i) // 4) for i in (1, 2, 3)}
    program, operands, trained = bind_stack(
        c.block, depth, "llm", cache=cache.full(), attention=plan if sockets else None, reduce=drops if sockets else None
    )
    arrays = {"operands": {"llm": operands}, "trained": {"llm": trained}}
    params = jax.eval_shape(lambda: llm.init(c))
    row = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def read(params, arrays, tokens, phase):
        bound = Bound(ModelProgram(c, (("llm", program),)), arrays, params)
        x = llm.embed(params, c, tokens)
        groups = {"vision": (x, llm.text_meta(tokens)), "text": (x, llm.text_meta(tokens, start=length))}
        out = stack.run(params, program, subset(arrays, "llm"), stack.streams_of(groups), phase=phase, new_rows=8)
        return bound, llm.finish(bound, out)

    def loss_fn(params, batch, key):
        bound, out = read(params, batch["arrays"], batch["tokens"], "train")
        return -jax.nn.log_softmax(out.logits)[..., 0].mean(), {}

    def prefill(params, arrays, tokens):
        bound, out = read(params, arrays, tokens, "prefill")
        pos = jnp.full(tokens.shape[0], 2 * length, jnp.int32)
        state = generation.Decoding(pos, pos, out.stack.caches, out.stack.states, generation.sampling.fresh(None),
                                    pos > pos, jnp.int32(0), jax.random.key(0))  # fmt: skip
        return out.logits[:, -1], state

    def decode(params, arrays, state):
        bound = Bound(ModelProgram(c, (("llm", program),)), arrays, params)
        return generation.decode(bound, state)

    optimizer = make_optimizer("adamw", 1e-3)
    state = {"params": params, "optimizer": jax.eval_shape(optimizer.init, params), "step": jnp.int32(0)}
    key = jax.eval_shape(lambda: jax.random.key(0))
    arrays = shapes(arrays)
    decoding = jax.eval_shape(prefill, params, arrays, row)[1]
    return {
        "train": Program(make_step(loss_fn, optimizer), (shapes(state), {"arrays": arrays, "tokens": row}, key), (0,)),
        "prefill": Program(prefill, (params, arrays, row)),
        "decode": Program(decode, (params, arrays, decoding), (2,)),
    }


def seconds(program: Program) -> tuple[float, float]:
    """(wall, CPU) seconds to trace, lower and compile, with nothing kept from before."""
    jax.clear_caches()
    start = time.perf_counter(), time.process_time()
    program.trace().lower().compile()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def layers(options: Layers) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    found = []
    for sockets in (False, True):
        for depth in options.depths:
            programs = depth_programs(depth, dim=options.dim, length=options.length, sockets=sockets)
            for phase in PHASES:
                wall, cpu = zip(*[seconds(programs[phase]) for _ in range(options.repeats)], strict=True)
                count = equations(programs[phase].trace().jaxpr)
                found.append({"sockets": sockets, "phase": phase, "layers": depth, "equations": count,
                              "seconds": statistics.median(wall), "cpu": statistics.median(cpu), "all": wall})  # fmt: skip
    if options.json:
        print(json.dumps(found))
        return
    first = options.depths[0]
    base = {(r["sockets"], r["phase"]): r for r in found if r["layers"] == first}

    def ratio(row, sockets, what):
        return f"{row[what] / base[sockets, row['phase']][what]:.2f}"

    rows = [
        ("3 drops, 2 attentions" if r["sockets"] else "plain", r["phase"], r["layers"], r["equations"],
         f"{r['seconds']:.2f}", ratio(r, r["sockets"], "seconds"), ratio(r, False, "seconds"),
         f"{r['cpu']:.2f}", ratio(r, r["sockets"], "cpu"))
        for r in found
    ]  # fmt: skip
    show(("program", "phase", "layers", "equations", "seconds", f"x {first} layers", f"x {first} plain", "CPU seconds",
          f"x {first} layers"), rows)  # fmt: skip


# ------------------------------------------------------------------------------------------------- memory of a step


@dataclasses.dataclass(frozen=True)
class Decode:
    """Temporary memory of one decoding step beside the cache that it reads and writes in place."""

    target: Literal["cpu", "tpu"] = "cpu"
    topology: str = "v5e:2x2"
    """TPU to compile for; the program takes one of its devices."""
    policies: tuple[str, ...] = ("full", "h2o:budget=4096,recent=4096")
    layers: int = 32
    slots: int = 8192
    dim: int = 128
    """Of the model: small, so that the weights of a layer, which the CPU copies, are small beside the cache."""
    json: bool = False
    """Print one JSON object instead of a table."""


def decode_program(policy: str, options: Decode, sharding=None) -> tuple[Program, int]:
    """(decoding step of a language model with grouped queries, bytes of its caches)."""
    dtype = jnp.bfloat16 if options.target == "tpu" else jnp.float32
    c = llm.config(1024, options.layers, options.dim, 8, kv_heads=2, head_dim=128, hidden=2 * options.dim)
    params = jax.eval_shape(lambda: jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 2 else x, llm.init(c)))
    bound = llm.bind(c, None, cache=as_record("cache", policy, options.layers))
    prompt = jax.ShapeDtypeStruct((1, 64), jnp.int32)

    def start(params, tokens):
        bound_now = Bound(bound.program, bound.arrays, params)
        return generation.prefill(bound_now, tokens, max_new=options.slots - 64, dtype=dtype)[1]

    def step(params, arrays, state):
        return generation.decode(Bound(bound.program, arrays, params), state, dtype=dtype)

    state = jax.eval_shape(start, params, prompt)
    args = (shapes(params, sharding), shapes(bound.arrays, sharding), shapes(state, sharding))
    return Program(step, args, (2,)), size(state.caches)


def decode_memory(policy: str, options: Decode) -> dict[str, Any]:
    sharding = None
    if options.target == "tpu":
        sharding = SingleDeviceSharding(topology(options.topology).devices[0])
    program, held = decode_program(policy, options, sharding)
    memory = program.trace().lower().compile().memory_analysis()
    temp, kept = memory.temp_size_in_bytes, memory.alias_size_in_bytes
    return {"policy": policy, "target": options.target, "cache": held, "temp": temp, "in place": kept, "share": temp / held}


def decode(options: Decode) -> None:
    found = [decode_memory(policy, options) for policy in options.policies]
    if options.json:
        print(json.dumps(found))
        return
    rows = [
        (r["policy"], r["target"], *(f"{r[k] / 2**20:.1f}" for k in ("cache", "in place", "temp")), f"{r['share']:.2%}")
        for r in found
    ]
    show(("policy", "target", "cache MiB", "in place MiB", "temporary MiB", "temporary / cache"), rows)


# ------------------------------------------------------------------------------------------ a large model, many chips


@dataclasses.dataclass(frozen=True)
class Train8B:
    """The training step of a Llama-3-like 8B model (AdamW, bfloat16 computation, remat) for a TPU slice."""

    topology: str = "v5p:4x4x8"
    data: int = 1
    fsdp: int = 32
    tensor: int = 4
    rows: int = 128
    """Of the batch, over all chips."""
    length: int = 8192
    layers: int = 32
    json: bool = False
    """Print one JSON object instead of a table."""


def train_8b_program(options: Train8B, c: llm.LLMConfig, mesh) -> Program:
    """The step of `python -m train lm`, on shapes laid out by the trainer's own rules."""
    bound = llm.bind(c, None, remat=True)
    optimizer = make_optimizer("adamw", 3e-4, weight_decay=0.1)

    def loss_fn(params, batch, key):
        return language_loss(bound, params, batch, key, dtype=jnp.bfloat16)

    def place(tree, where):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where)

    params = jax.eval_shape(lambda: llm.init(c))
    moments = jax.eval_shape(optimizer.init, params)
    state = {
        "params": place(params, shardings(params, mesh)),
        "optimizer": place(moments, shardings(moments, mesh)),
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh)),
    }
    names = {"tokens": jnp.int32, "targets": jnp.int32, "loss_mask": jnp.float32, "segment": jnp.int32, "position": jnp.int32}
    batch = {name: jax.ShapeDtypeStruct((options.rows, options.length), dtype) for name, dtype in names.items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    args = (state, place(batch, batch_shardings(batch, mesh)), shapes(key, replicated(mesh)))
    return Program(make_step(loss_fn, optimizer), args, (0,))


def train_8b(options: Train8B) -> None:
    mesh = make_mesh(data=options.data, fsdp=options.fsdp, tensor=options.tensor, devices=topology(options.topology).devices)
    c = llm.config(128256, options.layers, 4096, 32, kv_heads=8, hidden=14336, base=500000.0, tie=False, length=8192)
    program = train_8b_program(options, c, mesh)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = program.trace().lower()
    middle = time.perf_counter()
    compiled = lowered.compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(program.args[0]["params"]))
    tokens_of_step = options.rows * options.length
    found = {
        "topology": options.topology, "mesh": {k: v for k, v in mesh.shape.items() if v > 1},
        "parameters": count, "tokens of a step": tokens_of_step, "trace and lower, s": round(middle - start, 1),
        "compile, s": round(time.perf_counter() - middle, 1),
        **{f"{name} bytes per device": getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "temp", "output")},
        "peak bytes per device": memory.peak_memory_in_bytes,
        "flops per device, the compiler's, loops counted once": cost["flops"],
        "flops per device, 6 P + 6 L C N per token": tokens_of_step * (6 * count + 6 * c.layers * c.block.dim * options.length)
        / mesh.size,
    }  # fmt: skip
    if options.json:
        print(json.dumps(found))
    else:
        text = lambda v: f"{v:,}" if isinstance(v, int) else f"{v:.4g}" if isinstance(v, float) else str(v)  # noqa: E731
        show(("of the step", "value"), [(name, text(value)) for name, value in found.items()])


@dataclasses.dataclass(frozen=True)
class Serve8B:
    """Reading a prompt and one decoding step of a Llama-3-like 8B model (bfloat16) whose context fills a TPU slice."""

    topology: str = "v5p:2x2x2"
    tensor: int = 8
    rows: int = 1
    """Of the batch."""
    length: int = 131072
    """Positions of the cache: the prompt and ``new`` tokens."""
    new: int = 512
    layers: int = 32
    json: bool = False
    """Print one JSON object instead of a table."""


def serve_8b_config(options: Serve8B) -> llm.LLMConfig:
    """Llama 3.1 8B."""
    scaling = RopeScaling("llama3", factor=8.0, original_length=8192, low_freq_factor=1.0, high_freq_factor=4.0)
    return llm.config(128256, options.layers, 4096, 32, kv_heads=8, hidden=14336, tie=False, length=131072,
                      rope=Rope(128, 500000.0, scaling=scaling), eps=1e-5)  # fmt: skip


def serve_programs(options: Serve8B, c: llm.LLMConfig, mesh) -> tuple[Program, Callable]:
    """(prefill, what makes the decoding step of its result laid out as given)."""
    bound = llm.bind(c, None, cache=cache.full())

    def prefill(params, arrays, tokens):
        return generation.prefill(Bound(bound.program, arrays, params), tokens, max_new=options.new, dtype=jnp.bfloat16)

    def decode(params, arrays, state):
        return generation.decode(Bound(bound.program, arrays, params), state, dtype=jnp.bfloat16)

    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), jax.eval_shape(lambda: llm.init(c)))
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings(params, mesh))
    tokens = jax.ShapeDtypeStruct((options.rows, options.length - options.new), jnp.int32, sharding=replicated(mesh))
    fixed = (params, shapes(bound.arrays, replicated(mesh)))

    def step(layout) -> Program:
        state = jax.eval_shape(prefill, *fixed, tokens)[1]
        state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, layout[1])
        return Program(decode, (*fixed, state), (2,))

    return Program(prefill, (*fixed, tokens)), step


def serve_8b(options: Serve8B) -> None:
    mesh = make_mesh(data=1, tensor=options.tensor, devices=topology(options.topology).devices)
    c = serve_8b_config(options)
    program, step = serve_programs(options, c, mesh)
    found: dict[str, Any] = {"topology": options.topology, "mesh": {k: v for k, v in mesh.shape.items() if v > 1},
                             "context": options.length, "layers": c.layers}  # fmt: skip
    for phase in ("prefill", "decode"):
        start = time.perf_counter()
        with jax.set_mesh(mesh):
            compiled = program.trace().lower().compile()
        memory = compiled.memory_analysis()
        found |= {f"{phase}: compile, s": round(time.perf_counter() - start, 1),
                  **{f"{phase}: {name} bytes per device": getattr(memory, f"{name}_size_in_bytes")
                     for name in ("argument", "output", "alias", "temp")},
                  f"{phase}: peak bytes per device": memory.peak_memory_in_bytes}  # fmt: skip
        program = step(compiled.output_shardings)
        found["cache bytes"] = size(program.args[2].caches)
        if phase == "prefill":
            found["cache layout"] = str(program.args[2].caches[0].state.layer.k.sharding.spec)
    if options.json:
        print(json.dumps(found))
    else:
        show(("of the service", "value"), [(k, f"{v:,}" if isinstance(v, int) else str(v)) for k, v in found.items()])


def topology(name: str):
    """The TPU slice to compile for. Raises SystemExit where its compiler is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise SystemExit("target: expected the TPU compiler (pip install 'jaxattn[tpu-aot]'), got an environment without it")
    return topologies.get_topology_desc(platform="tpu", topology_name=name)


def show(columns: tuple[str, ...], rows: list[tuple]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main() -> None:
    commands = (
        Annotated[Layers, tyro.conf.subcommand("layers")]
        | Annotated[Decode, tyro.conf.subcommand("decode")]
        | Annotated[Train8B, tyro.conf.subcommand("train-8b")]
        | Annotated[Serve8B, tyro.conf.subcommand("serve-8b")]
    )
    options = tyro.cli(commands, description=__doc__.split("\n\n")[0])
    {Layers: layers, Decode: decode, Train8B: train_8b, Serve8B: serve_8b}[type(options)](options)


if __name__ == "__main__":
    main()
