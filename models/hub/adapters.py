"""Adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors beside a checkpoint that stays as it is."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core.types import expect
from models import lora as L
from models.bind import Bound
from models.hub import files
from models.hub.fields import Fields
from models.hub.load import FAMILIES, OWNERS, shapes_of
from models.hub.rules import Piece, expand

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LEAD = "base_model.model."
INERT = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
         "runtime_config", "task_type", "megatron_core", "loftq_config", "eva_config", "corda_config",
         "qalora_group_size")  # fmt: skip
# What changes the result where it is set; none of it is done here.
UNSET = ("use_dora", "use_qalora", "fan_in_fan_out", "lora_bias", "modules_to_save", "layers_to_transform",
         "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config", "layer_replication", "trainable_token_indices",
         "exclude_modules", "target_parameters", "ensure_weight_tying", "alora_invocation_tokens", "arrow_config",
         "lora_ga_config", "use_bdlora")  # fmt: skip


def _maps(bound: Bound, family: str | None) -> dict[str, list[Piece]]:
    """{place of a linear map: its pieces, one per layer} of a model in its family's names."""
    config = bound.program.config
    owner = OWNERS[type(config)]
    known = FAMILIES[family or owner.family_of(config)]
    shapes = {path: leaf.shape for path, leaf in shapes_of(config, known).items()}
    found: dict[str, list[Piece]] = {}
    for piece in expand(known.table(config), shapes):
        if L.PLACE.search(piece.path):
            found.setdefault(piece.path.removesuffix("/kernel"), []).append(piece)
    return found


def check_places(bound: Bound, places: list[str], family: str | None = None) -> None:
    """ValueError for places whose maps the family stores fused with others: their adapters have no name in PEFT's layout."""
    maps = _maps(bound, family)
    for place in places:
        piece = maps[place][0]
        expect("targets", place, f"maps that are stored alone; {piece.name} holds several", piece.part is None)


def save_adapter(bound: Bound, adapters: dict, lora: L.Lora, path: str | Path, *, base: str = "",
                 family: str | None = None) -> None:  # fmt: skip
    """Write adapters of a model for PEFT (and ``load_adapter``). base: where the checkpoint is; family: its model_type, where
    the model's features do not tell. Raises ValueError for maps that the family stores fused with others."""
    check_places(bound, [place for place, _ in L.pairs(adapters)], family)
    maps = _maps(bound, family)
    tensors, modules = [], set()
    for place, pair in L.pairs(adapters):
        for piece in maps[place]:
            name = piece.name.removesuffix(".weight")
            modules.add(name.rsplit(".", 1)[1])
            for side, x in (("A", pair["a"]), ("B", pair["b"])):
                make = functools.partial(lambda x, i: np.asarray(x[i]).T, x, piece.layer)
                tensors.append(files.Planned(f"{LEAD}{name}.lora_{side}.weight", np.dtype(x.dtype), x.shape[:0:-1], make))
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_file(folder / WEIGHTS, sorted(tensors, key=lambda t: t.name))
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base, r=lora.rank,
                  lora_alpha=lora.scale * lora.rank, lora_dropout=lora.dropout, target_modules=sorted(modules), bias="none",
                  fan_in_fan_out=False, inference_mode=True, use_rslora=False, use_dora=False)  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(bound: Bound, path: str | Path, *, family: str | None = None) -> tuple[dict, L.Lora]:
    """(adapters, Lora) of a directory in PEFT's layout, for ``lora.attach`` or ``lora.merge``.

    Raises ValueError, with names, for another kind of adapter, settings that are not supported, tensors that are missing,
    unexpected or of another shape, and pickled weights."""
    folder = Path(path)
    file = folder / CONFIG
    if not file.is_file():
        raise ValueError(f"path: expected {CONFIG} in {folder}")
    f = Fields(json.loads(file.read_text()), CONFIG)
    f.only("peft_type", "LORA")
    f.only("bias", "none")
    for name in UNSET:
        if f(name, None):
            raise ValueError(f"{CONFIG}: {name} = {f.raw[name]!r} is not supported")
    f.only("init_lora_weights", True, False, "gaussian")  # others change the base as well
    f.inert(*INERT)
    rank, alpha, dropout = f.size("r"), f("lora_alpha", 8), f("lora_dropout", 0.0)
    alpha = alpha * rank**0.5 if f("use_rslora", False) else alpha  # arXiv:2312.03732
    f.inert("target_modules")  # the tensors say it
    f.close()
    if not (folder / WEIGHTS).is_file():
        pickles = sorted(p.name for pattern in files.PICKLES for p in folder.glob(pattern))
        raise ValueError(f"path: expected {WEIGHTS} in {folder}" + (f", got {pickles}: pickled weights run code when read and "
                                                                    "are refused" if pickles else ""))  # fmt: skip
    headers = files.read_header(folder / WEIGHTS)
    maps = _maps(bound, family)
    adapters: dict = {}
    wanted, names = {}, []
    for place, pieces in maps.items():
        keys = [f"{LEAD}{piece.name.removesuffix('.weight')}.lora_{{}}.weight" for piece in pieces]
        if not any(k.format(s) in headers for k in keys for s in "AB"):
            continue
        expect("adapter", place, f"maps that are stored alone; {pieces[0].name} holds several", pieces[0].part is None)
        out, wide = pieces[0].shape
        wanted |= {k.format("A"): (rank, wide) for k in keys} | {k.format("B"): (out, rank) for k in keys}
        names.append((place, keys))
    problems = {"missing": sorted(wanted.keys() - headers.keys()), "unexpected": sorted(headers.keys() - wanted.keys()),
                "of another shape": [f"{n} {list(headers[n].shape)}, expected {list(s)}" for n, s in wanted.items()
                                     if n in headers and headers[n].shape != s]}  # fmt: skip
    if any(problems.values()):
        said = "; ".join(f"{len(v)} {k}: {', '.join(v[:20])}" for k, v in problems.items() if v)
        raise ValueError(f"{folder / WEIGHTS}: tensors do not fit the model: {said}")
    for place, keys in names:
        side = lambda s, keys=keys: jnp.stack([jnp.asarray(headers[k.format(s)].array().T) for k in keys])  # noqa: E731
        L.put(adapters, place, {"a": side("A"), "b": side("B")})
    found = sorted({place.rsplit("/", 1)[1] for place, _ in names}, key=L.MAPS.index)
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), adapters), L.Lora(
        rank, alpha, "+".join(found) or "all", dropout)  # fmt: skip
