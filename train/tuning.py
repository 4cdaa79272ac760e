"""Training that starts from a checkpoint in the Hugging Face format: all of it, or low-rank adapters beside it."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from models import hub
from models import lora as L
from models.bind import Bound
from models.hub import adapters as peft
from models.language.llm import LLMConfig
from train.config import LM
from train.data import Batches

ADAPTERS = "adapters"  # entry of the trained parameters
SOCKETS = "sockets"  # entry of the parameters for what bound methods train; absent where they train nothing
SHAPE = ("dim", "layers", "heads", "kv_heads", "mlp", "tied", "qk_norm")  # what the checkpoint says
BESIDE = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "generation_config.json", "vocab*",
          "merges.txt")  # fmt: skip


def tuned(config: LM, train: Batches, held_out: Batches):
    """The task of `python -m train lm --init PATH`, with `--lora` of its adapters alone."""
    from train.tasks import Stage, Task, language_loss

    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    if given := [name for name in SHAPE if getattr(config, name) != defaults[name]]:
        raise ValueError(f"{', '.join(given)}: expected nothing beside a checkpoint (init), which has its own")
    if config.merge is not None and jax.process_count() > 1:
        raise ValueError(f"merge: expected None with {jax.process_count()} processes; merge the adapters afterwards")
    lora = None if config.lora is None else L.parse(config.lora)
    bound, raw = hub.from_pretrained(config.init, dtype=None if lora else jnp.float32, mesh=config.mesh.make(),
                                     attention=config.attention, remat=config.remat)  # fmt: skip
    model = bound.program.config
    if not isinstance(model, LLMConfig):
        raise ValueError(f"init: expected a language model, got a {raw['model_type']}")
    words = train.info["vocab_size"]
    if words > model.vocab:
        raise ValueError(f"tokenizer: expected at most the {model.vocab} tokens of the checkpoint, got {words}")
    bare = Bound(bound.program, bound.arrays, None)
    sockets = bound.arrays["trained"] if jax.tree.leaves(bound.arrays["trained"]) else None
    own = {} if sockets is None else {SOCKETS: sockets}
    dtype = jnp.bfloat16 if config.dtype == "bfloat16" else jnp.float32

    def loss_fn(params, batch, key):
        params = dict(params)
        if lora is not None:
            added = params.pop(ADAPTERS)
            others = {k: params.pop(k) for k in own}
            params = {**L.attach(params, added, lora, key), **others}
        return language_loss(bare, params, batch, key, dtype=dtype)

    if lora is None:
        stage = Stage(loss_fn, train, held_out, config.steps)
        return Task(model, bare, {**bound.params, **own}, (stage,), export=lambda params: _merged(config, bare, raw, params))

    added = L.init(bound.params, lora, jax.random.key(config.seed))
    peft.check_places(bound, L.places(bound.params, lora), raw["model_type"])
    stage = Stage(loss_fn, train, held_out, config.steps, frozen=bound.params,
                  eval_loss=lambda params, batch, key: loss_fn(params, batch, None))  # fmt: skip

    def export(params):
        added = params[ADAPTERS]
        if jax.process_count() > 1:
            added = multihost_utils.process_allgather(added, tiled=True)
        if jax.process_index() == 0:
            peft.save_adapter(bound, added, lora, config.folder / "adapter", base=str(config.init), family=raw["model_type"])
        if config.merge is not None:
            _merged(config, bare, raw, L.merge(bound.params, added, lora))

    return Task(model, bare, {ADAPTERS: added, **own}, (stage,), export=export)


def _merged(config: LM, bare: Bound, raw: dict, params) -> None:
    if config.merge is None:
        return
    model = {k: v for k, v in params.items() if k != SOCKETS}
    hub.save_pretrained(Bound(bare.program, bare.arrays, model), config.merge, raw)
    for pattern in BESIDE:  # so that what reads the checkpoint reads this one
        for file in Path(config.init).glob(pattern):
            if file.is_file() and file.parent != config.merge:
                shutil.copy(file, config.merge)
