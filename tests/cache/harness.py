"""Attention layers without a model around them, driven through a cache policy in the order of the models' loop.

Project, positions, rotate, view, attend, evidence, pending; commit after the scan over layers. Weights are torch-style
[out, in], as golden vectors have them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core import statistics
from jaxattn.core.attend import attend_call
from jaxattn.core.mask import causal
from jaxattn.core.rope import rotate
from jaxattn.core.types import Call, Ctx, Meta, Spec, State, split


def turn(x, meta, base=10000.0):
    """Rotary embedding with frequencies in float64 where that is on (records round theirs to float32)."""
    freqs = base ** -(np.arange(0, x.shape[-1], 2) / x.shape[-1])
    pos = meta.pos if meta.rope is None else meta.rope
    return rotate(x, pos, freqs, per_head=meta.valid.ndim == 3)


def random_weights(rng, layers, dim, heads, kv_heads, d, dtype=np.float32):
    shapes = {"q": (heads * d, dim), "k": (kv_heads * d, dim), "v": (kv_heads * d, dim), "o": (dim, heads * d)}
    return {x: (rng.normal(size=(layers, *s)) * s[1] ** -0.5).astype(dtype) for x, s in shapes.items()}


def golden_weights(io):
    return {x: io[f"w.{x}_proj.weight"][None] for x in "qkvo"}


CHEAP = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # quick to compile


@functools.partial(jax.jit, static_argnames=("policy", "kv_heads", "phase", "mask", "residual"), compiler_options=CHEAP)
def step(policy, params, weights, state, x, meta, side, *, kv_heads, phase, mask=None, residual=True):
    """x [B, N, C] -> (y [B, N, C], outputs of every layer [L, B, N, C], State)."""
    b, n, c = x.shape
    layers = weights["q"].shape[0]
    d = weights["k"].shape[1] // kv_heads

    def body(carry, inputs):
        x, shared = carry
        layer, w, slots = inputs
        ctx, here, m = Ctx(layer=layer, phase=phase, x=x), State(slots, shared), meta
        if hasattr(policy, "positions"):
            m = policy.positions(params, here, m, ctx)
        q, k, v = (jnp.einsum("bnc,dc->bnd", x, w[i].astype(x.dtype)).reshape(b, n, -1, d) for i in "qkv")
        q_turned, k_turned = turn(q, m), turn(k, m)
        q_seen, k_seen = (q_turned, k_turned) if policy.rotated else (q, k)
        views = ()
        if phase != "prefill":
            views, shared = policy.view(params, here, q_seen, k_seen, m, ctx)
            if not policy.rotated:
                views = tuple(view.replace(k=turn(view.k, view.meta)) for view in views)
        call = Call(q_turned, k_turned, v, m, m, past=views, mask=causal() if mask is None else mask, key=side)
        part, _ = attend_call(call)
        facts = {}
        for need in policy.needs() if hasattr(policy, "needs") else ():
            own, past = statistics.received(call, part.lse, jnp.where(m.valid, 1.0, 0.0))
            facts[need.name] = {"own": own, "past": past}
        pending = policy.pending(params, here, k_seen, v, m, side, facts, ctx)
        y = jnp.einsum("bnd,cd->bnc", part.out.reshape(b, n, -1), w["o"].astype(x.dtype))
        return (x + y if residual else y, shared), (pending, y)

    inputs = (jnp.arange(layers), weights, state.layer)
    (x, shared), (pending, ys) = jax.lax.scan(body, (x, state.shared), inputs)
    return x, ys, policy.commit(params, State(state.layer, shared), pending)


class Stream:
    """A batch of texts fed in pieces through ``layers`` attention layers and one policy."""

    def __init__(self, policy, weights, *, heads, kv_heads, length, batch=1, residual=True):
        layers, rows, dim = weights["k"].shape
        d = rows // kv_heads
        dtype = jnp.asarray(weights["k"]).dtype.name
        spec = Spec(layers=layers, dim=dim, heads=heads, kv_heads=kv_heads, head_dim=d, value_dim=d, batch=batch,
                    length=length, dtype=dtype)  # fmt: skip
        self.policy, self.params = split(policy, spec)
        self.state, self.weights, self.spec = self.policy.init_state(spec), weights, spec
        self.kv_heads, self.residual = kv_heads, residual
        self.next = np.zeros(batch, int)
        self.started = False

    def feed(self, x, *, pos=None, valid=None, phase=None, side=None, mask=None):
        """The outputs of every layer [L, B, N, C] for the new rows."""
        b, n, _ = x.shape
        valid = np.ones((b, n), bool) if valid is None else valid
        pos = self.next[:, None] + np.maximum(np.cumsum(valid, 1) - 1, 0) if pos is None else pos
        if phase is None:
            phase = "prefill" if not self.started else "decode" if n == 1 else "extend"
        self.started, self.next = True, self.next + valid.sum(1)
        before = self.state
        meta = Meta(jnp.asarray(pos, jnp.int32), jnp.asarray(valid))
        x, ys, self.state = step(self.policy, self.params, self.weights, self.state, jnp.asarray(x), meta, side or {},
                                 kv_heads=self.kv_heads, phase=phase, mask=mask, residual=self.residual)  # fmt: skip
        if phase != "prefill":  # a cache can be the carry of a loop over steps
            kinds = [jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), state) for state in (before, self.state)]
            assert kinds[0] == kinds[1]
        self.x = x
        return ys

    def kept(self, layer=0, slots=None):
        """Sorted positions of the rows in the cache: nested lists [B][1|G]."""
        meta = (self.state.layer if slots is None else slots).meta
        pos, valid = np.asarray(meta.pos[layer]), np.asarray(meta.valid[layer])
        return [[sorted(p[v].tolist()) for p, v in zip(ps, vs, strict=True)] for ps, vs in zip(pos, valid, strict=True)]


def in_time(slots, layer=0, row=0, head=0):
    """(k, v, {stat}) of one head's rows in order of position."""
    valid = np.asarray(slots.meta.valid[layer, row])
    valid, pos = (np.asarray(x)[min(head, len(valid) - 1)] for x in (valid, slots.meta.pos[layer, row]))
    order = np.argsort(np.where(valid, pos, 1 << 30), kind="stable")[: valid.sum()]
    stats = {n: np.asarray(s)[layer, row, min(head, s.shape[2] - 1)][order] for n, s in slots.stats.items()}
    return np.asarray(slots.k)[layer, row, head][order], np.asarray(slots.v)[layer, row, head][order], stats
