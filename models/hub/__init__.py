"""Checkpoints in the Hugging Face format.

    model, config = hub.from_pretrained("/data/Qwen2-0.5B", dtype=jnp.bfloat16, cache="h2o:budget=512")
    hub.save_pretrained(model, "/data/tuned", config)

Families: llama, mistral, qwen2, qwen3, phi3; vit, deit, the vision towers of clip and siglip, dinov2 with and without
registers; llava (1.5). Directories are local; nothing is fetched.
"""

from models.hub.load import FAMILIES, from_pretrained, save_pretrained
from models.hub.multimodal import place_image

__all__ = ["FAMILIES", "from_pretrained", "place_image", "save_pretrained"]
