"""Checkpoints in the Hugging Face format.

    model, config = hub.from_pretrained("/data/Qwen2-0.5B", dtype=jnp.bfloat16, cache="h2o:budget=512")
    hub.save_pretrained(model, "/data/tuned", config)
    model = model._replace(params=lora.attach(model.params, *hub.load_adapter(model, "/data/adapter")))       # models.lora

Families: llama, mistral, qwen2, qwen3, phi3, gemma2, gemma3_text (gemma3 with ``part="text"``); bert; vit, deit, dinov2 with
and without registers; clip and siglip, whole or one tower; llava (1.5), llava_next (1.6), qwen2_5_vl.
Directories are local; nothing is fetched.
"""

from models.hub.adapters import load_adapter, save_adapter
from models.hub.load import FAMILIES, from_pretrained, save_pretrained
from models.hub.multimodal import place_image, place_pictures

__all__ = ["FAMILIES", "from_pretrained", "load_adapter", "place_image", "place_pictures", "save_adapter",
           "save_pretrained"]  # fmt: skip
