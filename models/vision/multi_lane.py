"""MULTI-LANE, "Less is more: Summarizing Patch Tokens for efficient Multi-Label Class-Incremental Learning": a frozen vision
transformer and, for each task that comes, a lane of a few tokens beside it.

A lane carries a copy of the class token and its own selectors. In every layer the selectors read the frozen patches (soft
attention with C ** -0.5 over the whole width), the class token attends to what they read and to the lane's prompts, the
summaries are dropped and the selectors put back. Lanes never meet: what a task learned stays as it was, to the bit of the
arithmetic. Published: ViT-B/16, 20 selectors, 20 prompts in the first 5 layers, Adam at 0.03 with a cosine, 30 epochs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxattn.core.attend import attend
from jaxattn.core.slots import bipartite, merge_tokens
from jaxattn.core.types import Array, contract, data, expect
from jaxattn.nn import block as B
from jaxattn.nn import layers
from models.vision import vit


@contract
class MultiLaneConfig:
    """Static shape of the lanes of a tower.

    vision: the frozen tower, with a class token.  tasks: the class numbers of each task, in order of arrival.
    selectors: tokens of a lane.  prompts: rows put in front of keys and values, in the first ``prompt_layers`` layers.
    tome: 0, or a number of tokens: repeated bipartite merging (half of the rows each time) summarises in place of learned
      selectors; lanes then carry the class token alone.
    replace: False summarises once, in front of the first layer; the summaries then stay and change as other tokens do.
    """

    vision: vit.ViTConfig
    tasks: tuple
    selectors: int = 20
    prompts: int = 20
    prompt_layers: int = 5
    tome: int = 0
    replace: bool = True

    def check(self):
        every = [k for task in self.tasks for k in task]
        ok = bool(self.tasks) and all(self.tasks) and sorted(every) == list(range(len(every)))
        expect("tasks", self.tasks, "every class 0, 1, ... in exactly one task", ok)
        expect("vision", self.vision, "a tower with a class token", self.vision.cls)
        fits = 0 <= self.prompt_layers <= self.vision.layers and self.prompts >= 0
        expect("prompt_layers", self.prompt_layers, f"at most the tower's {self.vision.layers}", fits)
        expect("selectors", self.selectors, "at least 1", self.selectors >= 1)
        rows = self.vision.patches + self.vision.special
        expect("tome", self.tome, f"0 or a number of the {rows} rows", 0 <= self.tome <= rows)

    @property
    def classes(self) -> int:
        return sum(len(task) for task in self.tasks)


@data
class MultiLaneOut:
    """logits float32 [B, K] of all classes (-inf for those whose task has no lane yet); lanes [T, B, K], every lane's own;
    cls [T, B, C], the lanes' normalised class tokens; x [B, N, C], the frozen tower's rows behind its last layer."""

    logits: Array
    lanes: Array
    cls: Array
    x: Array


def init(c: MultiLaneConfig, key) -> dict[str, Any]:
    """A lane and the head: selectors [S, C] (none with ``tome``), prompts [P_layers, 2, P, G, D], kernel [C, K], bias [K].

    Trained per task; start the next task's from the one before, all but the head's columns of other tasks."""
    b = c.vision.block
    a, k, h = jax.random.split(key, 3)
    square = jax.nn.initializers.orthogonal()
    lane: dict[str, Any] = {"kernel": jax.random.normal(h, (b.dim, c.classes)) * b.dim**-0.5, "bias": jnp.zeros(c.classes)}
    if not c.tome:
        lane["selectors"] = square(a, (c.selectors, b.dim))
    if c.prompts and c.prompt_layers:
        flat = square(k, (c.prompt_layers * 2 * c.prompts, b.kv_heads * b.head_dim))
        lane["prompts"] = flat.reshape(c.prompt_layers, 2, c.prompts, b.kv_heads, b.head_dim)
    return lane


def summarise(selectors: Array, x: Array) -> Array:
    """softmax(selectors x^T C ** -0.5) x: [B, S, C] over x [B, N, C], with gradients to the selectors alone."""
    x = jax.lax.stop_gradient(x)[:, :, None]
    return attend(selectors[:, :, None], x, x).out[:, :, 0]


def merge_down(x: Array, left: int) -> Array:
    """x [B, N, C] merged by repeated bipartite matching, half of the rows at a time, down to ``left`` means."""
    x = jax.lax.stop_gradient(x)
    while x.shape[1] > left:
        r = min(x.shape[1] // 2, x.shape[1] - left)
        x = merge_tokens(x, bipartite(x, r)[0], x.shape[1] - r, mode="mean")
    return x


def forward(c: MultiLaneConfig, vision: dict, lanes: tuple[dict, ...], image: Array, *, tasks: tuple[int, ...] | None = None,
            dtype=None) -> MultiLaneOut:  # fmt: skip
    """Images [B, H, W, channels] through a frozen tower and its lanes (MULTI-LANE, Summarizing Patch Tokens).

    Args:
      vision: parameters of the tower (``vit.init``); no gradient reaches them.
      lanes: one dict of ``init`` per task, all of one shape.
      tasks: their numbers; None: the first ones, in order. Training reads one lane: ``forward(c, vision, (lane,), image,
        tasks=(t,))``.
    """
    tasks = tuple(range(len(lanes))) if tasks is None else tasks
    expect("lanes", f"{len(lanes)} for tasks {tasks}", f"one for each, of {len(c.tasks)}",
           len(lanes) == len(tasks) and all(0 <= t < len(c.tasks) for t in tasks))  # fmt: skip
    vision = jax.lax.stop_gradient(vision)
    own = jax.tree.map(lambda *a: jnp.stack(a), *lanes)  # [T, ...]
    block, t = c.vision.block, len(lanes)
    x = jax.lax.stop_gradient(vit.embed(vision, c.vision, image, dtype).x)
    b, dim = x.shape[0], x.shape[2]
    z = jnp.broadcast_to(x[:, :1], (t, b, 1, dim))
    if not c.tome:
        rows = jnp.broadcast_to(own["selectors"][:, None].astype(x.dtype), (t, b, c.selectors, dim))
        z = jnp.concatenate([z, rows], 2)
    flat = lambda a: a.reshape(t * b, *a.shape[2:])  # noqa: E731
    apart = lambda a: a.reshape(t, b, *a.shape[1:])  # noqa: E731

    def read(zn, xn):
        """What each lane's tokens read of the patches: [T, B, S, C]."""
        if c.tome:
            return jnp.broadcast_to(merge_down(xn, c.tome), (t, b, c.tome, dim))
        asked = jnp.moveaxis(zn[:, :, 1:], 0, 1).reshape(b, -1, dim)
        return jnp.moveaxis(summarise(asked, xn).reshape(b, t, -1, dim), 1, 0)

    def layer(carry, inputs):
        x, z = carry
        number, prompts = inputs
        p = B.layer_of(vision["layers"], number)
        xn, zn = B.attention_input(p, block, x), apart(B.attention_input(p, block, flat(z)))
        u = jnp.concatenate([zn[:, :, :1], read(zn, xn)], 2) if c.replace else zn
        q, k, v = B.project(p["attn"], block, flat(u))
        if prompts is not None:
            more = jnp.broadcast_to(prompts[:, None].astype(k.dtype), (t, b, *prompts.shape[1:]))
            k, v = (jnp.concatenate([flat(more[:, :, i]), a], 1) for i, a in enumerate((k, v)))
        q = q[:, :1] if c.replace else q  # the summaries' own rows would be dropped
        a = B.attention_output(p, block, flat(z), attend(q, k, v, scale=block.scale).out)
        if c.replace:
            a = jnp.concatenate([a, flat(zn)[:, 1:]], 1)
        z = flat(z) + (a * p["scale1"]["scale"].astype(a.dtype) if block.layer_scale else a)
        z = apart(B.mlp_residual(p, block, z))
        q, k, v = B.project(p["attn"], block, xn)
        x = B.attention_residual(p, block, x, attend(q, k, v, scale=block.scale).out)
        return (B.mlp_residual(p, block, x), z), None

    if not c.replace:
        first = B.layer_of(vision["layers"], 0)
        xn, zn = B.attention_input(first, block, x), apart(B.attention_input(first, block, flat(z)))
        z = jnp.concatenate([z[:, :, :1], read(zn, xn)], 2)
    depth, prompted = c.vision.layers, c.prompt_layers if "prompts" in own else 0
    carry = (x, z)
    if prompted:
        carry, _ = jax.lax.scan(layer, carry, (jnp.arange(prompted), jnp.moveaxis(own["prompts"], 1, 0)))
    (x, z), _ = jax.lax.scan(layer, carry, (jnp.arange(prompted, depth), None))
    cls = z[:, :, 0]
    if c.vision.post_norm:
        cls = layers.norm(vision["norm"], cls, block.eps)
    unit = cls.astype(jnp.float32)
    unit = unit * jax.lax.rsqrt(jnp.maximum(jnp.sum(unit * unit, -1, keepdims=True), 1e-24))
    logits = jnp.einsum("tbc,tck->tbk", unit, own["kernel"]) + own["bias"][:, None]
    return MultiLaneOut(merge_classes(c, logits, tasks), logits, cls, x)


def merge_classes(c: MultiLaneConfig, logits: Array, tasks: tuple[int, ...]) -> Array:
    """[B, K]: of every class the logit of its own task's lane, from lanes [T, B, K] of ``tasks``; -inf where it has none."""
    found = jnp.full(logits.shape[1:], -jnp.inf, logits.dtype)
    for i, t in enumerate(tasks):
        columns = jnp.asarray(c.tasks[t])
        found = found.at[:, columns].set(logits[i][:, columns])
    return found


def loss(c: MultiLaneConfig, logits: Array, labels: Array, task: int) -> Array:
    """What trains the lane of ``task``: of its classes alone, from the lane's logits [B, K].

    labels: float [B, K], 1 where a class is in the picture (binary cross-entropy, several may be), or int [B], one class of
    the task (cross-entropy)."""
    columns = jnp.asarray(c.tasks[task])
    own = logits[:, columns]
    if labels.ndim == 2:
        return optax.sigmoid_binary_cross_entropy(own, labels[:, columns]).mean()
    nth = jnp.zeros(c.classes, jnp.int32).at[columns].set(jnp.arange(len(columns)))
    return optax.softmax_cross_entropy_with_integer_labels(own, nth[labels]).mean()


__all__ = ["MultiLaneConfig", "MultiLaneOut", "forward", "init", "loss", "merge_classes", "merge_down", "summarise"]
