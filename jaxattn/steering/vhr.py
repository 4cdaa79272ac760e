"""VHR: heads that change most when the image is removed are amplified.

"Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence".

With O the output of a head (before the output projection) at the position that predicts the first new token, and O'
the same without image tokens in the context, the vision-aware head divergence is VHD = ||O - O'||_2. Heads whose VHD
and whose text activation ||O'||_2^2 both exceed mean + std over the layer's heads are outliers and count as 0. Heads
strictly above the layer's median VHD are multiplied by alpha, layer after layer: when a layer is measured, the earlier
ones are already reinforced. The sets are found once, at prefill, and frozen; later steps only scale.

Both streams run as one batch of 2B rows, the second half being the first with its image rows not valid (``paired``).
The paper leaves open which prompt positions are scaled and whether the stream without image is: here all positions
(cached keys of later layers must agree with later steps) and both. Standard deviations are those of the population.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxattn.core.gates import head_gain
from jaxattn.core.select import gather_tokens, top_k
from jaxattn.core.types import Array, Ctx, Meta, Spec, State, contract, expect, operand
from jaxattn.registry import register


def divergence(out: Array, without: Array, *, outliers: bool = True) -> Array:
    """VHD [..., H], at least float32, of head outputs [..., H, Dv] with and without the image.

    ``outliers``: zero the heads that are extreme in VHD and in text activation alike."""
    acc = jnp.promote_types(out.dtype, jnp.float32)
    without = without.astype(acc)
    vhd = jnp.linalg.norm(out.astype(acc) - without, axis=-1)
    if not outliers:
        return vhd
    text = jnp.sum(without * without, -1)
    extreme = lambda x: x > jnp.mean(x, -1, keepdims=True) + jnp.std(x, -1, keepdims=True)  # noqa: E731
    return jnp.where(extreme(vhd) & extreme(text), 0.0, vhd)


def vision_aware(vhd: Array) -> Array:
    """bool [..., H]: heads strictly above the median over the heads."""
    return vhd > jnp.median(vhd, axis=-1, keepdims=True)


def t_vhd(vhd: Array, k: int) -> Array:
    """T-VHD [...] of a generated token: the sum over layers of the k largest divergences [..., L, H]. It is lower
    for hallucinated words and sentences."""
    return top_k(vhd, k)[0].sum((-2, -1))


@contract
class _VHR:
    alpha: float = operand("scalar")
    layers: tuple | None = operand("layers")
    paired: bool = True

    def init_state(self, spec: Spec) -> State:
        return State(jnp.ones((spec.layers, spec.batch, spec.heads), jnp.float32))

    def heads(self, params: dict, state: State, out: Array, meta: Meta, ctx: Ctx) -> tuple[Array, State]:
        rows = out.shape[0]
        if ctx.phase in ("train", "prefill"):
            expect("batch", f"{rows} rows", "an even number: every sample with and without its image", rows % 2 == 0)
            order = jnp.where(meta.valid, jnp.asarray(meta.pos), -1)
            last = jnp.broadcast_to(jnp.argmax(order, -1), (rows,))[: rows // 2]
            with_image, without = jnp.split(gather_tokens(out, jnp.tile(last, 2)[:, None])[:, 0], 2)
            chosen = vision_aware(divergence(with_image, without)) & jnp.asarray(params["layers"])[ctx.layer]
            gains = jnp.where(chosen, params["alpha"], 1.0).astype(jnp.float32)
            state = State(jnp.concatenate([gains, gains]), state.shared)
        # Both halves hold the same gains, so that decoding may go on without the second.
        return head_gain(out, state.layer[:rows]), state


@register("steering")
def vhr(alpha=2.0, *, layers=(1, *range(-14, 0))) -> _VHR:
    """VHR, vision-aware head reinforcement (Cracking the Code of Hallucination in LVLMs with Vision-aware Head
    Divergence).

    Args:
      alpha: factor of the heads above the median divergence; 1 changes nothing.
      layers: layer numbers (negative from the end), None for all. Default: the second and the last 14 as in
        LLaVA-1.5; the paper takes the last 18 in InstructBLIP.
    Both are operands. The model doubles the batch at prefill: rows B..2B-1 are rows 0..B-1 with ``valid`` False on
    image rows. Gains are float32 [L, 2B, H] in the State.
    """
    return _VHR(float(alpha), layers)


__all__ = ["divergence", "t_vhd", "vhr", "vision_aware"]
