"""The training loop: one jitted, donated step over split state; checkpoints, metrics and signals between steps.

    result = fit(loss_fn, params, stream, optimizer=make_optimizer("adamw", 1e-3), steps=1000,
                 checkpoint_dir="runs/lm/checkpoints", metrics_path="runs/lm/metrics.jsonl")

loss_fn(params, batch, key) -> (loss, metrics): a scalar and a dict of scalars. Everything random in it comes
from `key`, which is fold_in(seed key, step): a resumed run repeats the uninterrupted one bit for bit on the
same devices.
"""

import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from train.checkpoints import KEEP, CheckpointError, Checkpoints
from train.progress import Metrics, Show, plot_curve, read_metrics
from train.sharding import replicated, shard, shard_batch, shardings

LossFn = Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
INTERRUPTED = 130  # exit status of a program stopped by ctrl-C, as shells report it


@dataclasses.dataclass(frozen=True)
class Result:
    """params and opt_state after `step` steps; metrics: the last report; interrupted: a signal ended it."""

    params: Any
    opt_state: Any
    step: int
    metrics: dict[str, float]
    interrupted: bool


def loss_and_gradients(loss_fn: LossFn, params: Any, batch: Any, key: jax.Array, *, accumulate: int = 1):
    """(loss, metrics, gradients) of a batch, in `accumulate` parts one after another to save memory.

    Part i has the rows i, i + accumulate, ...: each device keeps its own rows. Parts are averaged with the
    weight metrics["weight"] (the targets that count, say) where the loss gives one, else equally, so a mean
    over weights is that of the whole batch. Part i draws from fold_in(key, i).
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulate == 1:
        (loss, metrics), grads = gradient(params, batch, key)
        return loss, dict(metrics), grads

    def split(x):
        if x.shape[0] % accumulate:
            raise ValueError(f"accumulate: expected a divisor of the batch of {x.shape[0]}, got {accumulate}")
        return jnp.moveaxis(x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]), 1, 0)

    def part(batch, number):
        (loss, metrics), grads = gradient(params, batch, jax.random.fold_in(key, number))
        weight = jnp.asarray(metrics.get("weight", 1.0), jnp.float32)
        found = (loss, {name: x for name, x in metrics.items() if name != "weight"}, grads)
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)) * weight, found), weight

    parts = jax.tree.map(split, batch)
    shapes = jax.eval_shape(part, jax.tree.map(lambda x: x[0], parts), 0)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (sums, weight), _ = jax.lax.scan(
        lambda total, item: (jax.tree.map(jnp.add, total, part(*item)), None),
        zero,
        (parts, jnp.arange(accumulate)),
    )
    # No weight at all (nothing to predict in the batch): sums are zero, and stay so.
    loss, metrics, grads = jax.tree.map(lambda x: x / jnp.where(weight > 0, weight, 1.0), sums)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
    return loss, {**metrics, "weight": weight}, grads


def make_step(loss_fn: LossFn, optimizer: optax.GradientTransformation, *, accumulate: int = 1):
    """step(state, batch, key, frozen={}) -> (state, metrics), to be jitted; state: params, optimizer, step; frozen:
    parameters that the loss reads besides and nothing changes."""

    def step(state, batch, key, frozen=MappingProxyType({})):
        key = jax.random.fold_in(key, state["step"])
        params = state["params"]

        def loss_of(params, batch, key):
            return loss_fn({**frozen, **params}, batch, key)

        loss, metrics, grads = loss_and_gradients(loss_of, params, batch, key, accumulate=accumulate)
        updates, opt_state = optimizer.update(grads, state["optimizer"], params)
        report = {**metrics, "loss": loss, "grad_norm": optax.tree.norm(grads)}
        state = {
            "params": optax.apply_updates(params, updates),
            "optimizer": opt_state,
            "step": state["step"] + 1,
        }
        return state, report

    return step


@contextmanager
def _signals():
    """Yields a list that fills with the SIGINT and SIGTERM received; a second one acts as usual."""
    got: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield got
        return
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        got.append(number)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _anywhere(flag: bool) -> bool:
    """Whether any process says so: all must leave the loop at the same step."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def _own(leaf: Any) -> jax.Array:
    """A copy of an array that the step may donate."""
    return jnp.array(leaf, copy=True)


def initial_state(params: Any, optimizer: optax.GradientTransformation, mesh: Any = None) -> dict[str, Any]:
    """State of step 0, on the mesh; the caller's arrays are not donated."""
    params = jax.tree.map(_own, params)
    if mesh is None:
        return {"params": params, "optimizer": jax.jit(optimizer.init)(params), "step": jnp.int32(0)}
    params = shard(params, mesh)
    where = shardings(jax.eval_shape(optimizer.init, params), mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=where)(params)
    return {"params": params, "optimizer": opt_state, "step": jax.device_put(np.int32(0), replicated(mesh))}


def _record(key, seed, stream, config, mesh) -> dict[str, Any]:
    """What a checkpoint says beside the arrays."""
    return {
        "config": config,
        "seed": seed,
        "key": {"impl": str(jax.random.key_impl(key)), "data": np.asarray(jax.random.key_data(key)).tolist()},
        # Streams of all processes stand at the same place; each takes its own rows from there.
        "data": stream.get_state(),
        "devices": {
            "platform": jax.default_backend(),
            "used": 1 if mesh is None else mesh.size,
            "local": jax.local_device_count(),
            "processes": jax.process_count(),
        },
    }


def _resume(checkpoints: Checkpoints, state, key, stream, now: Mapping[str, Any]):
    """(state, key, notes) of the latest checkpoint; the stream is moved to its place."""
    state, record = checkpoints.restore(state)
    try:
        key = jax.random.wrap_key_data(
            jnp.asarray(record["key"]["data"], jnp.uint32), impl=record["key"]["impl"]
        )
        stream.set_state(record["data"])
        before = {**record["config"], **record["devices"]}
    except Exception as error:  # set_state belongs to the stream: anything may come
        path = checkpoints.folder / str(record["step"]) / "record"
        got = f"{type(error).__name__}: {str(error)[:200]}"
        raise CheckpointError(path, "key, config, devices and a data position that fits this data", got) from error
    notes = [f"resumed from {checkpoints.folder} at step {record['step']}"]
    after = {**now["config"], **now["devices"]}
    changed = [
        f"{name} {before.get(name)} -> {after.get(name)}" for name in after if before.get(name) != after.get(name)
    ]
    if changed:
        notes.append("not the settings of the checkpoint, so not the run it would have been: " + ", ".join(changed))
    return state, key, notes


def _numbers(report: Mapping[str, jax.Array], step: int) -> dict[str, float]:
    """The report on the host. Raises FloatingPointError if loss or gradient is not finite."""
    values = {name: float(x) for name, x in jax.device_get(report).items()}
    if not np.isfinite([values["loss"], values["grad_norm"]]).all():
        raise FloatingPointError(
            f"step {step}: expected a finite loss and gradient, got loss {values['loss']} and gradient norm "
            f"{values['grad_norm']}; nothing is saved from here on"
        )
    return values


def fit(
    loss_fn: LossFn,
    params: Any,
    data_iterator: Iterator[Mapping[str, np.ndarray]],
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    mesh: Any = None,
    accumulate: int = 1,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    save_every: int = 500,
    keep: int | None = KEEP,
    resume: bool = True,
    config: Mapping[str, Any] | None = None,
    log_every: int = 20,
    metrics_path: str | Path | None = None,
    plot_path: str | Path | None = None,
    eval_fn: Callable[[Any, int], Mapping[str, float]] | None = None,
    eval_every: int | None = None,
    title: str = "train",
    unit: str = "tokens",
    quiet: bool = False,
    frozen: Any = None,
) -> Result:
    """Train `params` for `steps` steps in total, from the latest checkpoint if there is one.

    params: nested dict of arrays, kept (the step donates a copy). data_iterator: yields dicts of numpy arrays
    (with several processes: each its own rows); get_state and set_state make a run resumable. mesh None: one
    device. save_every, log_every and eval_every (None: only at the end) count steps; the last step is always
    saved, logged and evaluated. eval_fn(params, step) -> numbers, logged as "eval/...". config: values of
    JSON, kept in the checkpoints. metrics_path: JSON lines; plot_path: a PNG of the losses (needs matplotlib).
    frozen: entries of the loss's parameters that stay as they are: not optimized, not copied, not saved.
    resume False refuses a folder that has checkpoints. unit: what the rate counts, "tokens" or the batch's
    rows by another name.

    SIGINT or SIGTERM: the step in progress is finished and saved, and the result says interrupted; a second
    one acts at once.

    Raises CheckpointError, ValueError for bad arguments or data that ends early, and FloatingPointError at the
    first report, save or end that finds a loss or gradient that is not finite: such a state is never saved, so
    the last good checkpoint stays.
    """
    positive = {"steps": steps, "accumulate": accumulate, "save_every": save_every, "log_every": log_every}
    for name, value in {**positive, "eval_every": eval_every or 1}.items():
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
    if checkpoint_dir is not None and not hasattr(data_iterator, "set_state"):
        raise ValueError(
            f"data_iterator: expected get_state and set_state, to resume, got a {type(data_iterator).__name__}"
        )
    if mesh is None and jax.process_count() > 1:
        raise ValueError(f"mesh: expected one over the {jax.process_count()} processes, got None")

    first_process = jax.process_index() == 0
    key, config, notes, done = jax.random.key(seed), dict(config or {}), [], 0
    with ExitStack() as stack:
        checkpoints = None
        if checkpoint_dir is not None:
            checkpoints = stack.enter_context(Checkpoints(checkpoint_dir, keep=keep))
            if checkpoints.latest is not None and not resume:
                raise CheckpointError(
                    checkpoints.folder, "a folder without checkpoints (resume is off)", f"steps {checkpoints.steps}"
                )
        state = initial_state(params, optimizer, mesh)
        if checkpoints and checkpoints.latest is not None:
            now = _record(key, seed, data_iterator, config, mesh)
            state, key, notes = _resume(checkpoints, state, key, data_iterator, now)
            done = int(state["step"])
        if mesh is not None:
            bits, kind = np.asarray(jax.random.key_data(key)), str(jax.random.key_impl(key))
            everywhere = jax.jit(partial(jax.random.wrap_key_data, impl=kind), out_shardings=replicated(mesh))
            key = everywhere(bits)
            stack.enter_context(jax.set_mesh(mesh))
        frozen = dict(frozen or {})
        where = None if mesh is None else (jax.tree.map(lambda x: x.sharding, state), None)
        step_fn = jax.jit(
            make_step(loss_fn, optimizer, accumulate=accumulate), donate_argnums=0, out_shardings=where
        )
        writer = Metrics(metrics_path if first_process else None, after=done)
        stack.callback(writer.close)
        show = Show(title, steps, done, unit=unit, quiet=quiet or not first_process)
        stack.callback(show.close)
        signals = stack.enter_context(_signals())
        for note in notes:
            show.note(note)

        saved, values, stopped = done, {}, False
        while done < steps and not stopped:
            try:
                batch = next(data_iterator)
            except StopIteration:
                raise ValueError(
                    f"data_iterator: expected batches for {steps} steps, got its end after {done}"
                ) from None
            amount = _amount(batch, unit)
            state, report = step_fn(state, batch if mesh is None else shard_batch(batch, mesh), key, frozen)
            done += 1
            last, log_now = done == steps, done % log_every == 0
            # Processes can only agree where all of them ask; a lone one need not wait for the next report.
            if jax.process_count() == 1 or log_now:
                stopped = _anywhere(bool(signals)) and not last
            ends = last or stopped
            row: dict[str, Any] = {}
            if log_now or ends or done % save_every == 0:
                values = _numbers(report, done)
            if log_now or ends:
                rate = show.report(done, values, amount)
                row = {**values, f"{unit}_per_second": rate}
            if eval_fn is not None and (last or (eval_every and done % eval_every == 0)):
                found = {f"eval/{name}": float(x) for name, x in eval_fn({**frozen, **state["params"]}, done).items()}
                show.note(f"step {done}  " + "  ".join(f"{name} {x:.4g}" for name, x in found.items()))
                row |= found
            if row:
                writer.write({"step": done, "seconds": round(show.seconds(), 3), **row})
            if checkpoints and (ends or done % save_every == 0) and done != saved:
                checkpoints.save(done, state, _record(key, seed, data_iterator, config, mesh))
                saved = done
            show.step(done)
        if checkpoints:
            checkpoints.wait()
        if stopped:
            place = f"saved in {checkpoints.folder}" if checkpoints else "not saved: no checkpoint folder was given"
            show.note(f"interrupted after step {done}; {place}")
        if plot_path is not None and metrics_path is not None and first_process:
            if not plot_curve(read_metrics(metrics_path), plot_path, title=title):
                show.note("no picture of the loss: matplotlib is not installed (the extra `plot`)")
    return Result(state["params"], state["optimizer"], done, values, stopped)


def _amount(batch: Mapping[str, np.ndarray], unit: str) -> int:
    """Tokens, or rows, of the global batch."""
    counted = batch["tokens"].size if unit == "tokens" and "tokens" in batch else len(next(iter(batch.values())))
    return counted * jax.process_count()
