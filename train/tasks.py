"""What each command trains: data, model, losses and scores, in one stage or two.

    task = build(LM(steps=100))
    for stage in task.stages: ...   # `python -m train` runs `fit` on each, in order
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from models.bind import Bound
from models.language import llm
from models.multimodal import vlm
from models.vision import vit
from train import methods, scenes
from train.config import LM, VLM, Common, ViT
from train.data import Batches, CheckpointTokenizer, SceneConfig, lm_dataset, vit_dataset, vlm_dataset
from train.loop import LossFn
from train.sharding import shard_batch
from train.tuning import SOCKETS, tuned


@dataclass(frozen=True)
class Stage:
    """One call of `fit`. params: the entries of the task's parameters that it trains (None: all); score: numbers of
    an evaluation beyond the loss; folder: below that of the run, "" for the last stage; frozen: parameters that the loss
    reads and no step changes; eval_loss: what an evaluation computes, if not the training's loss."""

    loss_fn: LossFn
    batches: Batches
    held_out: Batches
    steps: int
    folder: str = ""
    params: tuple[str, ...] | None = None
    groups: dict[str, float] = field(default_factory=dict)
    score: Callable[[Any, Iterator], dict[str, float]] | None = None
    frozen: dict[str, Any] = field(default_factory=dict)
    eval_loss: LossFn | None = None

    def evaluator(self, count: int, mesh: Any = None):
        """eval_fn for `fit`: mean loss and metrics over `count` held-out batches."""
        count = max(1, min(count, self.held_out.size // self.held_out.batch_size))

        @jax.jit
        def one(params, batch):
            loss, metrics = (self.eval_loss or self.loss_fn)(params, batch, jax.random.key(0))
            return {"loss": loss, **metrics}

        def evaluate(params, step):
            total: dict[str, float] = {}
            for batch in islice(iter(self.held_out), count):
                values = jax.device_get(one(params, batch if mesh is None else shard_batch(batch, mesh)))
                weight = float(values.pop("weight", 1.0))
                for name, value in {**values, "weight": 1.0}.items():
                    total[name] = total.get(name, 0.0) + weight * float(value)
            weight = total.pop("weight") or 1.0
            result = {name: value / weight for name, value in total.items()}
            # Scores read predictions on the host, which a lone process has not all of.
            if self.score is not None and jax.process_count() == 1:
                result |= self.score(params, islice(iter(self.held_out), count))
            return result

        return evaluate


@dataclass(frozen=True)
class Task:
    """model: the static configuration; bound: the model with its sockets and no parameters; unit: what is counted per
    second; export: what to write from the trained parameters."""

    model: Any
    bound: Bound
    params: Any
    stages: tuple[Stage, ...]
    unit: str = "tokens"
    export: Callable[[Any], None] | None = None


def with_params(bound: Bound, params: Any) -> Bound:
    """The bound model with the parameters of a task or a checkpoint: its own, and those of its sockets."""
    params = {name: tree for name, tree in params.items() if name not in (methods.OBJECTIVE, methods.TEACHER)}
    trained = params.pop(SOCKETS, None)
    # A checkpoint has no entry for a site without parts.
    arrays = bound.arrays if trained is None else {**bound.arrays, "trained": {**bound.arrays["trained"], **trained}}
    return Bound(bound.program, arrays, params)


def _params(bound: Bound, params: dict) -> dict:
    trained = bound.arrays["trained"]
    return {**params, SOCKETS: trained} if jax.tree.leaves(trained) else params


def _dtype(config: Common):
    return jnp.bfloat16 if config.dtype == "bfloat16" else None


def _mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    return (values * mask).sum() / jnp.maximum(mask.sum(), 1.0)


def _streams(dataset: Callable[..., Batches], run: Common, /, **kwargs) -> tuple[Batches, Batches]:
    """(training, held out)."""
    where = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    kwargs = {"batch_size": run.batch, "seed": run.seed, **where, **kwargs}
    train = dataset(run.data, split="train", **kwargs)
    return train, dataset(run.data, split="validation", **{**kwargs, "shuffle": False})


def language_loss(bound: Bound, params: Any, batch: Any, key=None, *, dtype=None):
    """(loss, metrics): cross-entropy of the next token over the targets that count."""
    meta, mask = llm.record_meta(batch)
    out = llm.forward(with_params(bound, params), batch["tokens"], meta=meta, mask=mask, dtype=dtype, key=key)
    weight = batch["loss_mask"]
    nll = optax.softmax_cross_entropy_with_integer_labels(out.logits.astype(jnp.float32), batch["targets"])
    hit = (out.logits.argmax(-1) == batch["targets"]).astype(jnp.float32)
    return _mean(nll, weight), {"accuracy": _mean(hit, weight), "weight": weight.sum()}


def class_outcome(bound: Bound, params: Any, batch: Any, key=None, *, phase: str = "train", dtype=None) -> methods.Outcome:
    """Cross-entropy and accuracy of the image's class, and what else the classifier showed."""
    out = vit.forward(with_params(bound, params), batch["image"], phase=phase, dtype=dtype, key=key)
    nll = optax.softmax_cross_entropy_with_integer_labels(out.logits, batch["label"])
    metrics = {"accuracy": (out.logits.argmax(-1) == batch["label"]).mean(dtype=jnp.float32)}
    evidence = methods.of_patches(bound.program, out.stack)
    return methods.Outcome(nll.mean(), metrics, out.logits[:, None], jnp.ones((len(nll), 1)), evidence,
                           {"vision": out.stack.aux}, {"vision": out.stack.streams, "head": out.streams})  # fmt: skip


def language(config: LM) -> Task:
    tokenizer = config.tokenizer
    if config.init is not None and tokenizer is None:
        tokenizer = CheckpointTokenizer(config.init)
    train, held_out = _streams(
        lm_dataset, config, length=config.length, tokenizer=tokenizer or "byte", vocab_size=config.vocab_size,
        cache=config.folder,
    )  # fmt: skip
    if config.init is not None:
        return tuned(config, train, held_out)
    for name in ("lora", "merge"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name}: expected None without a checkpoint (init), got {getattr(config, name)}")
    model = llm.config(
        train.info["vocab_size"], config.layers, config.dim, config.heads, kv_heads=config.kv_heads,
        hidden=config.mlp, tie=config.tied, length=config.length, qk_norm=config.qk_norm,
    )  # fmt: skip
    bound = llm.bind(model, None, attention=config.attention, remat=config.remat, key=jax.random.key(config.seed))

    def loss_fn(params, batch, key):
        return language_loss(bound, params, batch, key, dtype=_dtype(config))

    stage = Stage(loss_fn, train, held_out, config.steps)
    return Task(model, bound, _params(bound, llm.init(model, config.seed)), (stage,))


def vision(config: ViT) -> Task:
    train, held_out = _streams(vit_dataset, config, size=config.size)
    info = train.info
    model = vit.config(
        config.size, config.patch, config.layers, config.dim, config.heads, channels=info["channels"],
        hidden=config.mlp, classes=len(info["classes"]),
    )  # fmt: skip
    named = methods.placed(config.tokens, "vision")
    bind = partial(vit.bind, model, None, attention=config.attention, remat=config.remat, key=jax.random.key(config.seed))
    bound, plain = bind(reduce=named), bind()

    def outcome(bound, params, batch, key, phase):
        return class_outcome(bound, params, batch, key, phase=phase, dtype=_dtype(config))

    objective = methods.objective_of(config.objective, tuple(named.values()))
    return _task(config, model, bound, plain, vit.init(model, config.seed), train, held_out, outcome, objective)


def _task(config, model, bound: Bound, plain: Bound, params, train: Batches, held_out: Batches, outcome, objective, *,
          groups=None, score=None, before: tuple[Stage, ...] = ()) -> Task:  # fmt: skip
    """A task whose last stage trains ``params`` with whatever is bound, from the run of --init if one is named.

    outcome: (bound, params, batch, key, phase) -> Outcome; plain: the model without token methods, a teacher's.
    """
    params = _params(bound, params)
    if config.init is not None:
        params = methods.filled(params, methods.load(config.init)[0])
    seen, teacher = methods.seeing(bound, objective), methods.seeing(plain, objective)
    plan = methods.prepare(partial(outcome, seen), partial(outcome, teacher), params, objective,
                           train.fetch(np.arange(min(config.batch, train.size))), key=jax.random.key(config.seed),
                           groups=groups or {}, trained=config.init is not None)  # fmt: skip
    stage = Stage(plan.loss_fn, train, held_out, config.steps, groups=plan.groups, score=score, frozen=plan.frozen,
                  eval_loss=plan.eval_loss)  # fmt: skip
    return Task(model, bound, plan.params, (*before, stage), unit="images")


def scene_model(config: VLM, vocab: int, channels: int = 1) -> vlm.VLMConfig:
    """The model that a command-line configuration describes, for `vocab` words and images of `channels`."""
    return scenes.scene_config(
        vocab, canvas=config.size, patch=config.patch, vision_dim=config.vision_dim,
        vision_layers=config.vision_layers, vision_heads=config.vision_heads, dim=config.dim,
        n_layers=config.layers, heads=config.heads, kv_heads=config.kv_heads, hidden=config.mlp, channels=channels,
    )  # fmt: skip


def multimodal(config: VLM) -> Task:
    own = config.data is not None
    if own:
        data = {"size": config.size, "length": config.length, "tokenizer": config.tokenizer}
    else:
        geometry = SceneConfig(canvas=config.size, patch=config.patch)
        words = {"mix": scenes.MIX, "with_transcript": config.transcripts, "together": config.questions}
        data = {"config": geometry, "count": config.scenes, **words}
    train, held_out = _streams(vlm_dataset, config, **data)
    model = scene_model(config, train.info["vocab_size"], train.info["channels"])
    bind = partial(vlm.bind, model, None, attention=config.attention, remat=config.remat, key=jax.random.key(config.seed))
    named = methods.placed(tuple(config.tokens.split(" + ")) if config.tokens else (), config.tokens_at)
    bound, plain = bind(reduce=named), bind()
    # The vision losses have a label for every patch: none where the tower loses some.
    auxiliary = 0.0 if own or bound.program.stack("vision").cuts else config.auxiliary

    def outcome(bound, params, batch, key, phase):
        ready = with_params(bound, params)
        return scenes.joint_outcome(ready, batch, key, auxiliary=auxiliary, dtype=_dtype(config), phase=phase)

    def tower(params, batch, key):
        return scenes.vision_loss(bound, params, batch, key, dtype=_dtype(config))

    def score(params, batches):
        found = scenes.evaluate(with_params(bound, params), batches)
        return {**found["accuracy"], "yes_recall": found["yes_recall"], "no_recall": found["no_recall"]}

    before: tuple[Stage, ...] = ()
    if config.vision_steps and not own and config.init is None:
        crowded = {"config": geometry.dense(), "mix": (), "count": max(1, config.scenes // 2)}
        alone = _streams(vlm_dataset, config, **crowded, batch_size=config.vision_batch, scene_seed=1)
        before = (Stage(tower, *alone, config.vision_steps, folder="vision", params=("vision", "aux")),)
    params = vlm.init(model, config.seed) if own else scenes.init(model, config.seed)
    objective = methods.objective_of(config.objective, tuple(named.values()))
    return _task(config, model, bound, plain, params, train, held_out, outcome, objective, before=before,
                 groups={"vision": config.vision_lr}, score=None if own else score)  # fmt: skip


def build(config: Common) -> Task:
    """The task that a command-line configuration describes."""
    makers = {LM: language, ViT: vision, VLM: multimodal}
    if type(config) not in makers:
        raise ValueError(f"config: expected one of LM, ViT and VLM, got {type(config).__name__}")
    return makers[type(config)](started(config))


def started(config: Common) -> Common:
    """The configuration with the shape of the run that it starts from."""
    if isinstance(config, LM) or config.init is None:
        return config
    same = config.folder.resolve() in (config.init.resolve(), config.init.resolve().parent)
    if same and config.steps:
        raise ValueError(f"out: expected another folder than that of init, got {config.folder}")
    return methods.shaped(config, methods.load(config.init)[1])


def load(run: Path, **changes) -> Bound:
    """The bound model of a run of `python -m train vit` or `vlm`: its methods, its parameters and theirs. changes: fields of
    its configuration, say other tokens that the same parts serve."""
    record = methods.load(run)[1]
    makers = {maker.task: maker for maker in (ViT, VLM)}
    said = record.get("config") or {}
    if said.get("task") not in makers:
        raise ValueError(f"run: expected one of the tasks {', '.join(makers)}, got {said.get('task')!r}")
    maker = makers[said["task"]]
    known = {f.name for f in fields(maker)} - {"mesh", "hosts", "init"}
    values = {name: tuple(x) if isinstance(x, list) else x for name, x in said.items() if name in known}
    values["data"] = None if values.get("data") is None else Path(values["data"])
    task = build(maker(**{**values, **changes, "init": run, "steps": 0}))
    return with_params(task.bound, task.params)
