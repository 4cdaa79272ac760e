"""The digit-scene vision-language model: its configuration, the losses of its two stages, and its scores.

Stage 1 teaches the tower alone (a class per patch, the digits present from CLS); stage 2 trains everything on answers,
keeping the vision losses. What made this learnable in minutes: windows that overlap and jitter on the patch grid, Muon
inside the layers, a small language model, and schedules that count steps (not seconds).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxattn.nn import layers
from models.bind import Bound
from models.language import llm
from models.multimodal import vlm
from models.vision import vit
from train import methods
from train.data.questions import KINDS

PATCH_CLASSES, BACKGROUND_WEIGHT, CLS_WEIGHT = 11, 0.25, 3.0
MIX = (("presence", 3), ("place", 3), ("count", 1), ("compare", 1), ("reading", 1))


def scene_config(vocab: int, *, canvas: int = 96, patch: int = 8, vision_dim: int = 64, vision_layers: int = 3,
                 vision_heads: int = 4, dim: int = 96, n_layers: int = 3, heads: int = 4, kv_heads: int | None = None,
                 hidden: int = 256, channels: int = 1) -> vlm.VLMConfig:  # fmt: skip
    """About 0.6 M parameters at the defaults: 144 visual tokens of overlapping 16 x 16 windows, a 3-layer language model."""
    tower = vit.config(canvas, patch, vision_layers, vision_dim, vision_heads, channels=channels, stem=2 * patch,
                       stem_hidden=128, pos_scale=0.5, activation="gelu_tanh")  # fmt: skip
    language = llm.config(vocab, n_layers, dim, heads, kv_heads=kv_heads, hidden=hidden, base=1000.0, length=256)
    return vlm.VLMConfig(tower, language, 2 * dim, select=-2, projector_norm=True, position=True)


def init(c: vlm.VLMConfig, seed: int = 0) -> dict:
    """Parameters of the model and of the auxiliary heads (key "aux")."""
    params = vlm.init(c, seed)
    dim = c.vision.block.dim

    def heads(key):
        a, b = jax.random.split(key)
        make = lambda key, n: {"kernel": jax.random.normal(key, (dim, n)) * dim**-0.5, "bias": jnp.zeros(n)}  # noqa: E731
        return {"patch": make(a, PATCH_CLASSES), "presence": make(b, 10)}

    return {**params, "aux": jax.jit(heads)(jax.random.key(seed + 1))}


def bound_model(c: vlm.VLMConfig, params: dict | None = None, **sockets) -> Bound:
    return vlm.bind(c, params, **sockets)


def _vision_terms(params: dict, streams, out_rows, batch: dict, c: vlm.VLMConfig):
    """Losses of one set of tower rows: patch classes on the patches, presence on CLS."""
    aux = params["aux"]
    rows = streams.tokens("vision").x if out_rows is None else out_rows
    logits = layers.dense(aux["patch"], rows).astype(jnp.float32)
    labels = batch["patch_labels"]
    weight = jnp.where(labels == PATCH_CLASSES - 1, BACKGROUND_WEIGHT, 1.0)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    patch = (nll * weight).sum() / weight.sum()
    shown = layers.dense(aux["presence"], streams.x[:, 0]).astype(jnp.float32)
    presence = optax.sigmoid_binary_cross_entropy(shown, batch["presence"]).mean()
    digit = labels != PATCH_CLASSES - 1
    hit = (logits.argmax(-1) == labels) & digit
    return patch, presence, {"patch_accuracy": hit.sum() / jnp.maximum(digit.sum(), 1)}


def vision_loss(bound: Bound, params: dict, batch: dict, key=None, *, dtype=None):
    """(loss, metrics) of the tower: classes of patches at the select layer, presence at it and at the last layer."""
    bound = bound._replace(params=params)
    return _vision(bound, params, batch, vlm.tower(bound, batch["image"], dtype=dtype, phase="train", whole=True))


def _vision(bound, params, batch, towers):
    c = bound.program.config
    middle, last = towers
    patch, presence, metrics = _vision_terms(params, middle.streams, None, batch, c)
    if last is not None:
        rows = last.streams.replace(x=layers.norm(params["vision"]["norm"], last.streams.x, c.vision.block.eps))
        presence = presence + _vision_terms(params, rows, None, batch, c)[1]
    return patch + CLS_WEIGHT * presence, {**metrics, "patch": patch, "presence_bce": presence}


def joint_outcome(bound: Bound, batch: dict, key=None, *, auxiliary: float = 0.3, dtype=None,
                  phase: str = "train") -> methods.Outcome:  # fmt: skip
    """Cross-entropy of the answers plus ``auxiliary`` times the vision losses, from one tower pass, and what else the model
    showed. Methods read all questions of an image together."""
    c, params = bound.program.config, bound.params
    towers = vlm.tower(bound, batch["image"], dtype=dtype, phase=phase, whole=auxiliary > 0)
    meta, mask = vlm.question_meta(c, batch)
    asked = (llm.embed(params["llm"], c.llm, batch["tokens"], dtype), meta.valid)
    visual = vlm.see(bound, batch["image"], prompt=asked, out=towers[0], dtype=dtype, phase=phase, key=key)
    out, _ = vlm.forward(bound, batch["image"], batch["tokens"], meta=meta, mask=mask, visual=visual, dtype=dtype, key=key,
                         phase=phase)  # fmt: skip
    nll = optax.softmax_cross_entropy_with_integer_labels(out.logits.astype(jnp.float32), batch["targets"])
    weight = batch["loss_mask"]
    answer = (nll * weight).sum() / jnp.maximum(weight.sum(), 1.0)
    hit = ((out.logits.argmax(-1) == batch["targets"]) * weight).sum() / jnp.maximum(weight.sum(), 1.0)
    loss, metrics = answer, {"answer": answer, "accuracy": hit}
    if auxiliary:
        vision, more = _vision(bound, params, batch, towers)
        loss, metrics = answer + auxiliary * vision, {**metrics, **more}
    evidence = {**out.stack.evidence, **methods.of_patches(bound.program, towers[0], towers[1])}
    return methods.Outcome(loss, metrics, out.logits, weight, evidence,
                           {"vision": towers[0].aux, "sites": visual.aux, "llm": out.stack.aux},
                           {"vision": towers[0].streams, "llm": out.stack.streams})  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- scores


@functools.partial(jax.jit, static_argnums=0)
def _answers(program, arrays, params, batch):
    """Predicted words [b, Q] read at each question's last token."""
    bound = Bound(program, arrays, params)
    meta, mask = vlm.question_meta(program.config, batch)
    out, visual = vlm.forward(bound, batch["image"], batch["tokens"], meta=meta, mask=mask, phase="prefill")
    b, q, t = batch["questions"].shape
    logits = out.logits[:, : q * t].reshape(b, q, t, -1)[:, :, -1]
    return logits.argmax(-1), visual.slot


def evaluate(bound: Bound, batches, *, limit: int | None = None) -> dict[str, Any]:
    """Accuracy per question kind, and yes- and no-recall of presence, over an iterable of scene batches.

    Returns {"accuracy": {kind: share}, "count": {kind: questions}, "yes_recall", "no_recall", "correct": per-kind arrays}.
    """
    found: list = []
    for i, batch in enumerate(batches):
        if limit is not None and i >= limit:
            break
        keep = {k: batch[k] for k in ("image", "tokens", "segment", "position", "questions")}
        predicted, _ = _answers(bound.program, bound.arrays, bound.params, keep)
        found.append((np.asarray(predicted), batch["answers"], batch["kind"]))
    return scores(*(np.concatenate(x) for x in zip(*found, strict=True)))


def scores(predicted: np.ndarray, answers: np.ndarray, kind: np.ndarray) -> dict[str, Any]:
    """What ``evaluate`` returns, from words predicted and right and the questions' kinds, each [S, Q]."""
    good = predicted == answers
    right = {name: good[kind == n] for n, name in enumerate(KINDS)}
    presence = kind == KINDS.index("presence")
    # Presence alternates between two answers; the larger id is "no" in the vocabulary's order yes, no.
    said, good = answers[presence], good[presence]
    yes_id = said.min() if said.size else 0
    mean = lambda x: float(np.mean(x)) if len(x) else float("nan")  # noqa: E731
    return {
        "accuracy": {k: mean(v) for k, v in right.items()},
        "count": {k: int(v.size) for k, v in right.items()},
        "yes_recall": mean(good[said == yes_id]),
        "no_recall": mean(good[said != yes_id]),
        "correct": right,
    }
