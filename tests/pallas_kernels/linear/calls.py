"""Calls of the linear operation for the tests of its bodies, and the comparison of a body with the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import linear as op

SHAPES = {
    "none": lambda b, n, h, f: None,
    "head": lambda b, n, h, f: (h,),
    "token": lambda b, n, h, f: (b, n, h),
    "shared tokens": lambda b, n, h, f: (1, n, h),
    "channel": lambda b, n, h, f: (b, n, h, f),
    "shared channels": lambda b, n, h, f: (1, n, h, f),
}


def call(rng, *, n, b=1, h=1, k_heads=None, v_heads=None, f=8, dv=None, decay="none", state=True, reset=(), chunk=None,
         scale=1.0, dtype=jnp.float32):  # fmt: skip
    """(operands, options); ``reset``: tokens whose decay is -inf."""
    dv = dv or f
    array = lambda *shape: jnp.asarray(rng.normal(size=shape) / 2, dtype)  # noqa: E731
    o = {"q": array(b, n, h, f), "k": array(b, n, k_heads or h, f), "v": array(b, n, v_heads or k_heads or h, dv)}
    shape = SHAPES[decay](b, n, h, f)
    if shape:
        d = -rng.exponential(0.3, size=shape)
        for t in reset:
            d[:, t] = -np.inf
        o["log_decay"] = jnp.asarray(d, jnp.float32)
    if state:
        o["state"] = jnp.asarray(rng.normal(size=(b, h, f, dv)), jnp.float32)
    return o, op.Options(chunk, scale)


def results(body, o, opt):
    """{out, state, and the gradient of every operand from both}."""

    def loss(o):
        out, state = body(o, opt)
        weight = lambda x: jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)  # noqa: E731
        return sum((x.astype(jnp.float32) * weight(x)).sum() for x in (out, state)), (out, state)

    (_, (out, state)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(o)
    return {"out": out, "end": state} | {"d_" + name: x for name, x in grads.items()}


reference = functools.partial(results, lambda o, opt: op.linear(o, opt, "reference"))


def compare(body, o, opt, tol, want=None):
    """Assert that ``body(o, opt)`` has the reference's values and gradients up to ``tol`` of each tensor's largest entry."""
    want, got = want or reference(o, opt), results(body, o, opt)
    for name, x in want.items():
        y = got[name]
        assert x.shape == y.shape and x.dtype == y.dtype, name
        x, y = (np.asarray(a, np.float32) for a in (x, y))
        np.testing.assert_allclose(y, x, rtol=0, atol=tol * max(np.abs(x).max(), 1e-3), err_msg=name)


@functools.cache
def case(name):
    """(operands, options, the reference's results) of one of CALLS."""
    o, opt = call(np.random.default_rng(0), **CALLS[name])
    return o, opt, reference(o, opt)


def check(body, name):
    o, opt, want = case(name)
    compare(body, o, opt, 2e-2 if o["q"].dtype == jnp.bfloat16 else 1e-5, want)


CALLS = {
    "1": dict(n=1, h=2, f=5, dv=3, decay="token"),
    "17: no decay, keys and values of other heads": dict(n=17, b=2, h=6, k_heads=2, v_heads=3, f=8, dv=9, scale=0.25),
    "127: one decay per head": dict(n=127, b=2, h=2, k_heads=1, f=12, dv=130, decay="head"),
    "129: resets": dict(n=129, b=2, h=2, k_heads=1, f=8, decay="shared tokens", reset=(3, 4, 90, 128)),
    "129: per channel, resets": dict(n=129, b=2, h=2, k_heads=1, f=20, dv=7, decay="shared channels", reset=(5, 77)),
    "129: bfloat16": dict(n=129, h=2, k_heads=1, f=20, decay="token", dtype=jnp.bfloat16),
    "129: bfloat16 per channel": dict(n=129, h=1, f=20, decay="channel", dtype=jnp.bfloat16),
    "1000: no state": dict(n=1000, h=2, k_heads=1, f=16, decay="token", chunk=128, state=False),
}
