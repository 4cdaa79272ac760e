"""Reading and writing whole checkpoints: everything is checked from headers, then read tensor by tensor into its place.

No host holds more than its share of the parameters, one tensor, and that tensor's copy on the way to a device: stacked
parameters begin as zeros on the devices and take one layer at a time in a donated update; shards of a mesh read the
slices they hold and no others.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxattn.core.types import expect
from jaxattn.nn.partition import logical_axes, path_name, spec
from models.bind import Bound
from models.hub import dual, encoders, files, language, multimodal, vision
from models.hub.families import Family
from models.hub.fields import Fields
from models.hub.rules import Piece, expand
from models.language.encoder import EncoderConfig
from models.language.llm import LLMConfig
from models.multimodal.dual import DualConfig
from models.multimodal.vlm import VLMConfig
from models.vision.positions import at_size
from models.vision.vit import ViTConfig

FAMILIES: dict[str, Family] = {f.name: f for f in (*language.FAMILIES, *encoders.FAMILIES, *vision.FAMILIES,
                                                   *dual.FAMILIES, *multimodal.FAMILIES)}  # fmt: skip
OWNERS = {LLMConfig: language, EncoderConfig: encoders, ViTConfig: vision, DualConfig: dual, VLMConfig: multimodal}
LISTED = 20  # names shown in an error


def from_pretrained(path: str | Path, *, dtype=None, mesh=None, image=None, part=None, **sockets) -> tuple[Bound, dict]:
    """A model from a local directory in the Hugging Face format: config.json and safetensors.

    Args:
      path: the directory.  dtype: of the parameters; None keeps what is stored.
      mesh: parameters are laid out over it (axes data, fsdp, sequence, tensor, of type Auto) by the tables of
        ``jaxattn.nn.partition``; None puts them on one device.
      image: (height, width) that a vision tower shall read, if not the checkpoint's: its positions are interpolated.
      part: "vision" or "text", one tower of a clip or siglip alone; "text" of a gemma3 (its tower is not read).
      sockets: attention, reduce, cache, steering, ... as in the model's ``bind``.
    Returns: (bound model, config.json as a dict: token ids and other things that are not the model's). The model's own
      configuration is ``bound.program.config``.
    Raises ValueError, before anything large is allocated, for a model_type or a field that is not supported, tensors that are
    missing, unexpected or of another shape (all listed), missing or truncated shards, and pickled weights.
    """
    dtype = None if dtype is None else jnp.dtype(dtype)
    raw = files.read_config(path)
    family, fields = family_for(raw, part)
    headers = _renamed(files.read_headers(path), family.aliases)
    config = family.read(fields, headers.keys())
    fields.close()
    pieces, kept = plan(family, config, headers, str(path))
    expect("image", image, f"None for a {family.name}", image is None or not isinstance(config, LLMConfig | EncoderConfig))
    params = read(config, family, pieces, headers, dtype, mesh)
    if image is not None:
        config, params = _at_size(config, params, image, family)
    if kept:
        everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        params["extra"] = {name: _whole(headers[name].array(), dtype, everywhere) for name in kept}
    return family.model.bind(config, params, **sockets), raw


def _at_size(config, params: dict, image, family: Family):
    """A tower, or a model with one, for images of another size."""
    tower = config if isinstance(config, ViTConfig) else config.vision
    antialias = family.name == "dinov2_with_registers"  # the one family that transformers smooths
    if tower is config:
        return at_size(config, params, image, antialias=antialias)
    new, mine = at_size(tower, params["vision"], image, antialias=antialias)
    return dataclasses.replace(config, vision=new), {**params, "vision": mine}


def family_for(raw: dict, part: str | None = None) -> tuple[Family, Fields]:
    """The family of a config.json and its fields; of one part of a model that has several."""
    name = raw.get("model_type")
    parts = dual.PARTS.get(name, {})
    if part is not None or (parts and name not in FAMILIES):
        expect("part", part, f"one of {sorted(parts)} of a {name}" if parts else f"None for a {name}", part in parts)
        family, field, shared = parts[part]
        fields = dual.part_of(raw, field) | {k: raw[k] for k in shared if k in raw}
        return family, Fields(fields, f"config.json: {field}", family.defaults)
    if name not in FAMILIES:
        raise ValueError(f"config.json: model_type: expected one of {sorted({*FAMILIES, *dual.PARTS})}, got {name!r}")
    return FAMILIES[name], Fields(raw, defaults=FAMILIES[name].defaults)


def _renamed(headers: dict, aliases) -> dict:
    found = {}
    for name, stored in headers.items():
        for pattern, replacement in aliases:
            name = re.sub(pattern, replacement, name)
        found[name] = stored
    return found


def shapes_of(config, family: Family) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape and dtype} of a configuration's parameters, without making them."""
    tree = jax.eval_shape(lambda: family.model.init(config))
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def plan(family: Family, config, headers: dict, where: str) -> tuple[list[Piece], list[str]]:
    """(pieces of all parameters, names kept as they are); every stored tensor is accounted for, or ValueError lists it."""
    pieces = expand(family.table(config), {path: leaf.shape for path, leaf in shapes_of(config, family).items()})
    wanted = {piece.name: piece.shape for piece in pieces}
    rest = headers.keys() - wanted.keys()
    kept = sorted(n for n in rest if any(re.search(p, n) for p in family.keep))
    unused = {n for n in rest if any(re.search(p, n) for p in family.unused(config))}
    problems = {
        "missing": sorted(wanted.keys() - headers.keys()),
        "unexpected": sorted(rest - set(kept) - unused),
        "of another shape than config.json says": [
            f"{n} {list(headers[n].shape)}, expected {list(shape)}"
            for n, shape in wanted.items() if n in headers and headers[n].shape != shape
        ],
    }  # fmt: skip
    found = [f"{len(names)} {what}: {', '.join(names[:LISTED])}{', ...' if len(names) > LISTED else ''}"
             for what, names in problems.items() if names]  # fmt: skip
    if found:
        raise ValueError(f"{where}: tensors do not fit a {family.name}: " + "; ".join(found))
    return pieces, kept


def read(config, family: Family, pieces: list[Piece], headers: dict, dtype, mesh) -> dict:
    """The parameters as a nested dict."""
    by_path: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_path.setdefault(piece.path, []).append(piece)
    params: dict[str, Any] = {}
    for path, leaf in shapes_of(config, family).items():
        mine = by_path[path]
        kind = jnp.dtype(dtype or functools.reduce(jnp.promote_types, (headers[p.name].dtype for p in mine)))
        axes = logical_axes(path, len(leaf.shape))
        *folders, last = path.split("/")
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = _parameter(mine, headers, leaf.shape, kind, axes, mesh)
    return params


def _parameter(pieces: list[Piece], headers: dict, shape, dtype, axes, mesh) -> jax.Array:
    def layout(shape, axes):
        return SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, spec(shape, axes, mesh))

    if pieces[0].layer is not None:
        where = layout(shape, axes)
        inner = where if mesh is None else NamedSharding(mesh, PartitionSpec(*where.spec[1:]))
        buffer = _zeros(shape, dtype, where)
        for piece in pieces:
            value = _whole(piece.see(headers[piece.name].array()), dtype, inner)
            buffer = _update(buffer, value, piece.layer)
            # The next layer's copy must not be made while this one's is still waiting to be read.
            buffer.block_until_ready()
        return buffer
    if len(pieces) == 1 and pieces[0].rows is None:
        return _whole(pieces[0].see(headers[pieces[0].name].array()), dtype, layout(shape, axes))
    host = np.zeros(shape, dtype)  # a few rows from several tensors
    for piece in pieces:
        host[slice(*piece.rows)] = piece.see(headers[piece.name].array())
    return _whole(host, dtype, layout(shape, axes))


def _whole(view: np.ndarray, dtype, sharding) -> jax.Array:
    """A file's view as an array: every device's slice is copied out of the map and cast on its own."""
    dtype = view.dtype if dtype is None else dtype
    sharding = SingleDeviceSharding(jax.devices()[0]) if sharding is None else sharding
    return jax.make_array_from_callback(view.shape, sharding, lambda index: _copy(view, index, dtype))


def _copy(view: np.ndarray, index, dtype) -> np.ndarray:
    """The one place where a tensor's bytes leave the file."""
    return np.array(view[index], dtype, order="C")


def _zeros(shape, dtype, sharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@functools.partial(jax.jit, donate_argnums=0)
def _update(buffer, value, layer):
    return jax.lax.dynamic_update_index_in_dim(buffer, value, layer, 0)


def save_pretrained(bound: Bound, path: str | Path, config: dict | None = None, *, family: str | None = None,
                    shard_bytes: int = 5 * 10**9) -> None:  # fmt: skip
    """Write a model as config.json and safetensors, which ``from_pretrained`` and transformers load.

    Args:
      config: the dict of ``from_pretrained``; its fields that are not the model's (token ids, names) are kept. None: the
        family is found from the model's features, or ``family`` (a model_type) names it.
      shard_bytes: a checkpoint larger than this becomes several files and an index.
    Parameters are written in the dtype they have, one tensor in memory at a time. Raises ValueError for a model that no
    family describes.
    """
    ours = bound.program.config
    expect("bound", type(ours).__name__, f"a model among {[c.__name__ for c in OWNERS]}", type(ours) in OWNERS)
    family, text = _description(ours, config, family)
    params = {k: v for k, v in bound.params.items() if k != "extra"}
    flat = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    pieces = expand(family.table(ours), {p: x.shape for p, x in flat.items()})
    if lost := sorted(flat.keys() - {piece.path for piece in pieces}):
        raise ValueError(f"bound: parameters without a name in a {family.name} checkpoint: {lost[:LISTED]}")
    by_name: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_name.setdefault(piece.name, []).append(piece)
    tensors = [_tensor(family.stored(ours, name), mine, flat) for name, mine in by_name.items()]
    for name, x in bound.params.get("extra", {}).items():
        tensors.append(files.Planned(family.stored(ours, name), np.dtype(x.dtype), x.shape, functools.partial(np.asarray, x)))
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder, tensors, shard_bytes)
    (folder / "config.json").write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")


def _description(ours, config: dict | None, name: str | None) -> tuple[Family, dict]:
    """(family, config.json) of a model; ``config`` as it was read where it still says the same."""
    raw = dict(config or {})
    family = FAMILIES.get(name or raw.get("model_type"))
    expect("family", name, f"one of {sorted(FAMILIES)}", family is not None or name is None)
    if family is not None and raw.get("model_type") == family.name and _says(family, raw, ours):
        return family, raw
    if family is None or not _says(family, None, ours):
        expect("family", name, f"one with the features of {ours}", name is None)
        family = FAMILIES[OWNERS[type(ours)].family_of(ours)]
        expect("config", ours, f"features that a {family.name}, the nearest family, can describe", _says(family, None, ours))
    stale = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "layer_types", "architectures",
             "text_config", "vision_config", "max_window_layers", "id2label", "label2id", "original_max_position_embeddings",
             "rope_local_base_freq", "sliding_window_pattern")  # fmt: skip
    kept = {k: v for k, v in raw.items() if k not in stale} if raw.get("model_type") == family.name else {}
    return family, {**kept, **family.write(ours, family.name)}


def _says(family: Family, raw: dict | None, ours) -> bool:
    """Whether a config.json (None: the one the family writes) describes this very model."""
    if type(ours).__module__ != family.model.__name__:
        return False
    names = {rule.name for rule in family.table(ours)}  # which heads are stored
    try:
        raw = family.write(ours, family.name) if raw is None else raw
        return family.read(Fields(raw, defaults=family.defaults), names) == ours
    except ValueError:
        return False


def _tensor(name: str, pieces: list[Piece], flat: dict) -> files.Planned:
    dtype = np.dtype(flat[pieces[0].path].dtype)
    shape = pieces[0].shape

    def make():
        stored = np.zeros(shape, dtype)
        for piece in pieces:
            leaf = flat[piece.path]
            leaf = leaf if piece.layer is None else leaf[piece.layer]
            piece.put(stored, np.asarray(leaf if piece.rows is None else leaf[slice(*piece.rows)]))
        return stored

    return files.Planned(name, dtype, shape, make)
