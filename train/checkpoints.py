"""Checkpoints: parameters, optimizer state, step, random key, data position and configuration in one step.

Written by orbax in the background: into a temporary folder, renamed when complete, so that a kill at any moment
leaves the last complete step. Nested dicts of arrays only, readable without the optimizer that wrote them.
Every leaf's bits are summed before writing and after reading: the storage format alone does not notice a
flipped byte.
"""

import gc
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from train.sharding import path_name, shardings

KEEP = 3


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of something else: path, what was expected, what came."""

    def __init__(self, path: str | Path, expected: str, got: str):
        super().__init__(f"checkpoint {path}: expected {expected}, got {got}")


def to_dict(tree: Any) -> dict[str, Any]:
    """Any pytree as a nested dict whose keys are the parts of its leaves' paths (empty parts vanish)."""
    result: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *folders, name = path_name(path).split("/")
        place = result
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = leaf
    return result


def from_dict(nested: Mapping[str, Any], like: Any) -> Any:
    """The leaves of `to_dict` in the structure of `like`."""

    def find(path, _):
        place = nested
        for part in path_name(path).split("/"):
            place = place[part]
        return place

    return jax.tree_util.tree_map_with_path(find, like)


@jax.jit
def _sums(tree):
    """The bits of each leaf as unsigned integers, added modulo 2^32: the same for every sharding."""

    def total(x):
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
        return jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32).sum(dtype=jnp.uint32)

    return jax.tree.map(total, tree)


def checksums(tree: Any) -> dict[str, int]:
    """Path of a leaf -> sum of its bits."""
    sums = jax.device_get(_sums(tree))
    return {path_name(path): int(value) for path, value in jax.tree_util.tree_leaves_with_path(sums)}


def _describe(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _layout(tree: Any) -> dict[str, str]:
    return {path_name(path): _describe(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


class Checkpoints:
    """The checkpoints below one folder, `<folder>/<step>/`. Close it, or use it in a `with` statement."""

    def __init__(self, folder: str | Path, *, keep: int | None = KEEP):
        """keep: how many of the newest steps stay; None: all."""
        if keep is not None and keep < 1:
            raise ValueError(f"keep: expected 1 or more, or None for all, got {keep}")
        self.folder = Path(folder).absolute()
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(self.folder, "a folder", "a file")
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "record": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def steps(self) -> list[int]:
        """The complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    @property
    def latest(self) -> int | None:
        return max(self.steps, default=None)

    def save(self, step: int, state: Mapping[str, Any], record: Mapping[str, Any], *, force=False) -> None:
        """Start writing `state` (trees of arrays by name) and `record` (values of JSON) as `step`.

        Returns once the arrays have left the devices' buffers, which may then be donated.
        """
        state = to_dict(dict(state))
        # Through JSON here, so that an unwritable value is an error of this call and not of the background.
        record = json.loads(json.dumps({**record, "step": step, "checksums": checksums(state)}))
        args = {"state": ocp.args.PyTreeSave(state), "record": ocp.args.JsonSave(record)}
        self._manager.save(step, args=ocp.args.Composite(**args), force=force)

    def wait(self) -> None:
        """Until everything is on disk; raises what went wrong while writing."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def _step(self, step: int | None) -> tuple[int, Path]:
        steps = self.steps
        if not steps:
            raise CheckpointError(self.folder, "at least one complete step", "none")
        if step is None:
            step = steps[-1]
        if step not in steps:
            raise CheckpointError(self.folder, f"one of the steps {steps}", f"step {step}")
        return step, self.folder / str(step)

    def record(self, step: int | None = None) -> dict[str, Any]:
        """The JSON saved with a step (None: the latest)."""
        step, path = self._step(step)
        try:
            args = ocp.args.Composite(record=ocp.args.JsonRestore())
            found = self._manager.restore(step, args=args)["record"]
        except Exception as error:
            raise CheckpointError(path / "record", "a JSON record", _short(error)) from error
        if not isinstance(found, dict) or found.get("step") != step or "checksums" not in found:
            raise CheckpointError(path / "record", f"a JSON record of step {step}", repr(found)[:80])
        return found

    def restore(self, like: Mapping[str, Any], step: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """(state, record) of a step (None: the latest), in structure, dtypes and shardings of `like`.

        like: trees by name, of arrays or ShapeDtypeStruct; without shardings arrays come to the default device.
        A name of the checkpoint that `like` lacks is not read. Raises CheckpointError.
        """
        step, path = self._step(step)
        record = self.record(step)
        wanted = to_dict(jax.tree.map(_abstract, dict(like)))
        self._compare(step, path, wanted)
        try:
            where = ocp.checkpoint_utils.construct_restore_args(wanted)
            args = ocp.args.PyTreeRestore(item=wanted, restore_args=where, partial_restore=True)
            found = self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]
            damage = None
        except Exception as error:  # orbax has no common class for what damaged files lead to
            damage = _short(error)
        if damage is not None:
            _drop_unread()
            raise CheckpointError(path / "state", "readable arrays", damage)
        for name, total in checksums(found).items():
            if record["checksums"].get(name) != total:
                raise CheckpointError(
                    path / "state", f"{name} with checksum {record['checksums'].get(name)}", f"{total}: damaged"
                )
        return from_dict(found, dict(like)), record

    def _saved(self, step: int, path: Path) -> dict[str, Any]:
        """The tree of array metadata of a step."""
        try:
            metadata = self._manager.item_metadata(step)["state"]
            return dict(metadata.tree)
        except Exception as error:
            raise CheckpointError(path / "state", "readable metadata of arrays", _short(error)) from error

    def _compare(self, step: int, path: Path, wanted: Mapping[str, Any]) -> None:
        saved = _layout({name: tree for name, tree in self._saved(step, path).items() if name in wanted})
        expected = _layout(wanted)
        for name in sorted(expected.keys() | saved.keys(), key=lambda name: (not name.startswith("params/"), name)):
            if expected.get(name) != saved.get(name):
                raise CheckpointError(
                    path, f"{name} {expected.get(name, 'absent')}", f"{saved.get(name, 'nothing of that name')}"
                )


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _drop_unread() -> None:
    """Collect the reads that a failed one left behind: each would print its own traceback at some later time."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = hook


def _short(error: Exception) -> str:
    text = str(error).split("\n")[0].split(" See full")[0]
    return f"{type(error).__name__}: {text[:200]}"


def load_params(folder: str | Path, *, step: int | None = None, mesh: Any = None) -> tuple[Any, dict[str, Any]]:
    """(parameters, record) of a training run, whatever model and optimizer wrote them; sharded over `mesh`.

    The record holds step, config and what `fit` saved beside them. Raises CheckpointError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(folder, "a folder of checkpoints", "nothing" if not folder.exists() else "a file")
    with Checkpoints(folder, keep=None) as checkpoints:
        step, path = checkpoints._step(step)
        saved = checkpoints._saved(step, path)
        if "params" not in saved:
            raise CheckpointError(path, "an entry 'params'", f"entries {sorted(saved)}")
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved["params"])
        if mesh is not None:
            like = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, shardings(like, mesh)
            )
        state, record = checkpoints.restore({"params": like}, step)
    return state["params"], record
