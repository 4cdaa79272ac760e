"""python -m train convert METHOD --model RUN: a method's offline search or calibration on a trained model.

    python -m train convert vflowopt:average=0.25,calls=40 --model runs/demo --out vflowopt.npz
    python -m benchmarks board ... "vflowopt:artifact=vflowopt.npz"

Runs a conversion of the registry (``name`` or ``name_...``) on the run's parameters and data, and writes what it found as an
artifact (``jaxattn.core.artifact``), which the method's factory takes back as its argument ``artifact``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxattn import registry
from jaxattn.core import artifact
from jaxattn.core.types import Need, contract, expect


@dataclasses.dataclass(frozen=True)
class Convert:
    """Run a method's offline search or calibration on a trained vision-language model and write the artifact."""

    task: ClassVar[str] = "convert"

    method: Annotated[str, tyro.conf.Positional]
    """A conversion as "name" or "name:arg=value,...", say dymu, yopo:share=0.5 or attention_debiasing:host='fastv:keep=36'."""
    model: Path
    """A run of `python -m train vlm`."""
    out: Path | None = None
    """File of the artifact; None: <model>/<name>.npz."""
    batches: int = 4
    """Of calibration data."""
    batch: int = 16
    """Images of each."""
    split: Literal["train", "validation"] = "train"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Seen:
    """One pass of a model over a batch: see ``core.types.Trained``."""

    hidden: jax.Array
    right: np.ndarray
    evidence: dict[str, jax.Array]
    told: dict[str, Any]


@contract
class _Probe:
    """Asks for evidence and edits nothing."""

    asked: tuple[Need, ...]

    def needs(self):
        return self.asked


class Trained:
    """A bound vision-language model, as conversions run it."""

    def __init__(self, bound):
        c = bound.program.config
        self.bound, self.visual = bound, c.visual
        self.layers = {"vision": c.run_layers, "llm": c.llm.layers}

    def run(self, batch: dict, *, needs: tuple[Need, ...] = (), **sockets) -> Seen:
        import models

        steering = sockets.pop("steering", ())
        steering = steering if isinstance(steering, tuple) else (steering,)
        bound = models.bind(self.bound, **sockets, steering=(*steering, _Probe(tuple(needs))) if needs else steering or None)
        read = {name: batch[name] for name in ("image", "tokens", "targets", "segment", "position", "loss_mask")}
        names = tuple(need.name for need in needs)
        hidden, right, evidence, told = _pass(bound.program, names, bound.arrays, bound.params, read)
        answers = np.asarray(batch["loss_mask"]) > 0
        return Seen(hidden[answers], np.asarray(right)[answers], evidence, told)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pass(program, names, arrays, params, batch):
    from models.bind import Bound
    from models.language import llm
    from models.multimodal import vlm

    bound = Bound(program, arrays, params)
    meta, mask = vlm.question_meta(program.config, batch)
    meta = meta.replace(labels={**meta.labels, "generates": (batch["loss_mask"] > 0).astype(jnp.int32)})
    asked = (llm.embed(params["llm"], program.config.llm, batch["tokens"]), meta.valid)
    visual = vlm.see(bound, batch["image"], prompt=asked, phase="prefill")
    out, _ = vlm.forward(bound, batch["image"], batch["tokens"], meta=meta, mask=mask, phase="prefill", visual=visual)
    told = {"vision": visual.tower.aux, "sites": visual.aux, "llm": out.stack.aux}
    return out.hidden, out.logits.argmax(-1) == batch["targets"], {x: out.stack.evidence[x] for x in names}, told


def conversion(text: str):
    """(name, function (model, batches, key) -> (model, artifact), arguments' text) of "name:arg=value,..."; a method's name
    finds its conversion."""
    name, _, arguments = text.partition(":")
    name = name.strip().replace("-", "_")
    known = registry.names("conversion")
    near = [x for x in known if x.startswith(f"{name}_")]
    name = near[0] if name not in known and len(near) == 1 else name
    found = registry.get("conversion", name)
    first, *rest = inspect.signature(found).parameters.values()
    expect("method", name, "a conversion that needs nothing but a model and batches besides its arguments",
           not {"forward", "shape"} & {p.name for p in rest})  # fmt: skip

    def given(**chosen):
        return lambda model, batches, key: found(model, batches, key, **chosen)

    own = [p for p in rest if p.kind is p.KEYWORD_ONLY]
    given.__signature__ = inspect.Signature(own)
    given.__annotations__ = {p.name: found.__annotations__[p.name] for p in own if p.name in found.__annotations__}
    return name, registry.build(f"conversion {name!r}", given, arguments), arguments


def convert(text: str, model: Trained, batches: Iterable[dict], out: Path, key=None,
            header: dict[str, Any] | None = None) -> dict[str, np.ndarray]:  # fmt: skip
    """Run the conversion that ``text`` names and write its artifact with what ``header`` says beside; returns the arrays."""
    name, run, arguments = conversion(text)
    _, found = run(model, batches, jax.random.key(0) if key is None else key)
    artifact.save(out, found, maker=name, arguments=arguments, **(header or {}))
    return found


def run(config: Convert) -> int:
    """What the command does; returns the exit status."""
    from train import methods, scenes, tasks
    from train.data import SceneConfig, vlm_dataset

    name, _, _ = conversion(config.method)  # a mistake is an error before anything is loaded
    for field in ("batches", "batch"):
        expect(field, getattr(config, field), "at least 1", getattr(config, field) >= 1)
    count = config.batches * config.batch
    record = methods.load(config.model)[1].get("config") or {}
    expect("model", record.get("task"), "a run of the task 'vlm'", record.get("task") == "vlm")
    bound = tasks.load(config.model, scenes=count)
    own = record.get("data")
    data = {"size": record["size"], "length": record["length"], "tokenizer": record["tokenizer"]}
    if own is None:
        geometry = SceneConfig(canvas=record["size"], patch=record["patch"])
        data = {"config": geometry, "count": count, "mix": scenes.MIX}
    held = vlm_dataset(own, split=config.split, batch_size=config.batch, seed=config.seed, **data)
    batches = [held.fetch(np.arange(i, i + config.batch) % held.size) for i in range(0, count, config.batch)]
    out = config.model / f"{name}.npz" if config.out is None else config.out
    began = time.perf_counter()
    about = {"run": str(config.model)} | {x: getattr(config, x) for x in ("split", "batches", "batch", "seed")}
    found = convert(config.method, Trained(bound), batches, out, jax.random.key(config.seed), about)
    for entry, value in found.items():
        print(f"{entry}: {_shown(value)}")
    print(f"wrote {out.with_suffix('.npz') if not out.suffix else out} in {time.perf_counter() - began:.1f} s")
    return 0


def _shown(value: np.ndarray) -> str:
    value = np.asarray(value)
    if value.size > 64:
        return f"{value.dtype} {list(value.shape)}, mean {value.mean():.4g}"
    return np.array2string(value.astype(int) if value.dtype == bool else value, precision=4, separator=", ", max_line_width=120)
