"""Compilation does not grow with depth, decoding holds one copy of the cache, and a mesh does not gather activations."""

import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import compile_report as report
from models import llm
from models.bind import Bound
from train.sharding import batch_shardings, make_mesh, shardings

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("sockets", [False, True], ids=["plain", "three drops and two attentions"])
def test_programs_do_not_grow_with_depth(sockets):
    few, many = ({phase: report.equations(p.trace().jaxpr) for phase, p in
                  report.depth_programs(depth, dim=32, length=16, sockets=sockets).items()} for depth in (8, 32))  # fmt: skip
    assert few == many and min(few.values()) > 100


def test_compile_time_does_not_grow_with_depth():
    """CPU time and a loose bound: the equal jaxprs above are the invariant, this is for what XLA makes of them."""
    few, many = (report.depth_programs(depth, dim=32, length=16)["decode"] for depth in (8, 32))
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        times = [(report.seconds(few)[1], report.seconds(many)[1]) for _ in range(7)]
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
    short, long = (statistics.median(t) for t in zip(*times, strict=True))
    assert long < 1.6 * short, times


@pytest.mark.parametrize("policy", report.Decode().policies)
def test_a_decoding_step_holds_one_copy_of_the_cache(policy):
    found = report.decode_memory(policy, report.Decode())
    assert found["cache"] > 500 << 20
    assert found["in place"] >= found["cache"]
    assert found["temp"] < 0.05 * found["cache"], found


def test_a_decoding_step_holds_one_copy_of_the_cache_on_tpu():
    pytest.importorskip("libtpu", reason="compiles for a TPU: pip install 'jaxattn[tpu-aot]'")
    # A process of its own: libtpu reads its settings once. Several of them may load it, as no device is touched.
    env = os.environ | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "benchmarks.compile_report", "decode", "--target", "tpu", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert [r["policy"] for r in found] == list(report.Decode().policies)
    assert all(r["temp"] < 0.05 * r["cache"] and r["in place"] >= r["cache"] for r in found), found


def test_an_8b_model_reads_and_continues_128k_tokens():
    """The report's programs, narrow, shorter and on the CPU: the cache is cut by heads and written in place, and reading holds
    no map of all pairs."""
    options = report.Serve8B(length=16384, new=256)
    mesh = make_mesh(data=1, tensor=8)
    c = llm.config(512, 2, 64, 8, kv_heads=8, hidden=128, tie=False)
    program, step = report.serve_programs(options, c, mesh)
    with jax.set_mesh(mesh):
        reading = program.trace().lower().compile()
        program = step(reading.output_shardings)
        decoding = program.trace().lower().compile()
    caches = program.args[2].caches
    cache = report.size(caches)
    assert "tensor" in caches[0].state.layer.k.sharding.spec and cache > 2 * options.length * c.block.dim * 2 * 2
    reading, decoding = reading.memory_analysis(), decoding.memory_analysis()
    assert reading.output_size_in_bytes < cache / 4 < options.length**2
    assert reading.temp_size_in_bytes < options.length**2 / 8, reading
    assert decoding.alias_size_in_bytes > cache / 8, decoding


def test_a_mesh_gathers_parameters_and_not_activations():
    """Gradients of a language model over fsdp x tensor: what is gathered has no axis of rows times tokens."""
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    c = llm.tiny(vocab=96, dim=64, heads=4, kv_heads=2, hidden=128, tie=False)
    params = jax.eval_shape(lambda: llm.init(c))
    place = lambda tree, where: jax.tree.map(  # noqa: E731
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where
    )
    batch = {"tokens": jax.ShapeDtypeStruct((8, 256), jnp.int32)}
    bound = llm.bind(c, None, remat=True)

    def loss(params, batch):
        logits = llm.forward(Bound(bound.program, bound.arrays, params), batch["tokens"]).logits
        return jax.nn.logsumexp(logits, -1).mean()

    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss))
        args = place(params, shardings(params, mesh)), place(batch, batch_shardings(batch, mesh))
        text = step.lower(*args).compile().as_text()
    gathered = re.findall(r"= \(?\w+\[([\d,]*)\]\S* (?:all-gather|all-to-all)(?:-start)?\(", text)
    assert gathered, "an fsdp mesh gathers parameters"
    sizes = [math.prod(int(d) for d in shape.split(",") if d) for shape in gathered]
    rows = 8 * 256 // 4  # of one device
    # Embedded rows arrive cut by channels, as the table is, and are laid out by rows once each way; nothing else moves.
    assert max(sizes) <= rows * c.block.dim and sum(n > 64 * 128 for n in sizes) <= 2, gathered
    whole = [tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", text)]
    assert all(math.prod(s) <= rows * c.block.dim for s in whole if s[:2] == (8, 256)), "rows of the whole batch on a device"
