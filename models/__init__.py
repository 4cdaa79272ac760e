"""Models that expose the sockets: language model, text encoder, vision tower, two towers, vision-language model.

    model = models.llm.bind(config, params, cache=cache.full())
    faster = models.bind(model, attention=sparse.flexprefill(), cache=cache.h2o(budget=256))    # same weights
    tokens = models.generate(faster, prompts, steps=64)
    model, config = models.from_pretrained("/data/Qwen2-0.5B", cache="h2o:budget=512")                   # see models.hub
"""

from __future__ import annotations

from models import sampling
from models.bind import Bound, Program, by_layer, dense
from models.generate import generate, stream
from models.hub import from_pretrained, save_pretrained
from models.language import encoder, llm
from models.multimodal import dual, langdc, textmonkey, vlm
from models.vision import vit

_FAMILIES = {
    llm.LLMConfig: llm, encoder.EncoderConfig: encoder, vit.ViTConfig: vit, dual.DualConfig: dual, vlm.VLMConfig: vlm,
    langdc.LangDCConfig: langdc, textmonkey.TextMonkeyConfig: textmonkey,
}  # fmt: skip


def bind(model: Bound, **sockets) -> Bound:
    """The same weights under other sockets (attention, reduce, cache, steering, ...; see each model's ``bind``).

    Sockets are replaced as a whole: what is not named is the default again."""
    return _FAMILIES[type(model.program.config)].bind(model.program.config, model.params, **sockets)


def build(config, seed: int = 0, **sockets) -> Bound:
    """A freshly initialised model of a configuration, bound to sockets."""
    family = _FAMILIES[type(config)]
    return family.bind(config, family.init(config, seed), **sockets)


__all__ = ["Bound", "Program", "bind", "build", "by_layer", "dense", "dual", "encoder", "from_pretrained", "generate",
           "langdc", "llm", "sampling", "save_pretrained", "stream", "textmonkey", "vit", "vlm"]  # fmt: skip
