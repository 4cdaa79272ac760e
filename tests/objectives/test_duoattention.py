"""Training of DuoAttention's gates: the released step, the ends of a gate, gates that find the head that recalls."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core.attend import attend
from jaxattn.core.mask import causal
from jaxattn.core.rope import rotate
from jaxattn.core.types import Call, Ctx, Meta, State
from jaxattn.objectives.duoattention import (
    clamp,
    distillation,
    duoattention,
    duoattention_gates,
    duoattention_streams,
    schedule,
    streaming_mask,
)  # fmt: skip


def test_golden_step(golden):
    io = golden("163-duoattention")
    with jax.enable_x64(True):
        meta = Meta.of(24)
        np.testing.assert_array_equal(streaming_mask(3, 5)(meta, meta)[0, 0], io["streaming_mask"])
        kind = duoattention_streams(3, 5)

        def outputs(gates):
            x = jnp.concatenate([io["x_full"], io["x_mixed"]])
            q, k, v = ((x @ io[f"w.{i}_proj.weight"].T).reshape(4, 24, -1, 6) for i in "qkv")
            freqs = 10000.0 ** -(np.arange(0, 6, 2) / 6)
            q, k = rotate(q, meta.pos, freqs), rotate(k, meta.pos, freqs)
            call = Call(q, k, v, meta, meta, mask=causal())
            part, _, _ = kind.apply({"gates": gates}, State(), call, Ctx())
            return part.out.reshape(4, 24, -1) @ io["w.o_proj.weight"].T

        def loss(gates):
            batch = {"loss_mask": jnp.asarray(io["label_mask"], float)}
            forward = lambda batch: SimpleNamespace(hidden=outputs(gates))  # noqa: E731
            return duoattention(0.05).loss({"gates": gates}, State(), forward, batch, None)

        gates = jnp.asarray([0.8, 0.3])  # the array in the file is the one deployed afterwards
        y = outputs(gates)
        np.testing.assert_allclose(y[:2], io["y_full"], atol=1e-9)
        np.testing.assert_allclose(y[2:], io["y_mixed"], atol=1e-9)
        (value, parts), gradient = jax.value_and_grad(loss, has_aux=True)(gates)
        np.testing.assert_allclose(parts["distillation"], io["distill_loss"], atol=1e-9)
        np.testing.assert_allclose(parts["gates"], io["reg_loss"], atol=1e-9)
        # The records round 0.05 to float32.
        np.testing.assert_allclose(value, io["loss"], atol=1e-8)
        np.testing.assert_allclose(gradient, io["grad_gates"], atol=1e-8)


def call_of(rng, n=20):
    q, k, v = (jnp.asarray(rng.normal(size=(4, n, h, 8)), jnp.float32) for h in (4, 2, 2))
    return Call(q, k, v, Meta.of(n), Meta.of(n), mask=causal())


def test_gates_of_one_and_zero_are_full_and_streaming_attention(rng):
    call = call_of(rng)
    kind = duoattention_streams(2, 4)
    run = jax.jit(lambda gates: kind.apply({"gates": gates}, State(), call, Ctx())[0].out)
    full = attend(call.q, call.k, call.v, mask=causal()).out
    streaming = attend(call.q, call.k, call.v, mask=streaming_mask(2, 4)).out
    np.testing.assert_allclose(run(jnp.ones(2)), jnp.concatenate([full[:2], full[:2]]), atol=1e-6)
    np.testing.assert_allclose(run(jnp.zeros(2)), jnp.concatenate([full[:2], streaming[2:]]), atol=1e-6)
    halves = run(jnp.asarray([1.0, 0.0]))[2:]  # kv head 0 serves query heads 0 and 1
    np.testing.assert_allclose(halves, jnp.concatenate([full[:2, :, :2], streaming[2:, :, 2:]], 2), atol=1e-6)
    own = duoattention_streams(2, 4, teacher_forced=False).apply({"gates": jnp.ones(2)}, State(), call, Ctx())[0].out
    np.testing.assert_allclose(own, full, atol=1e-6)


def test_identical_streams_cost_the_regularisation_alone(rng):
    hidden = jnp.asarray(rng.normal(size=(2, 5, 3)), jnp.float32)
    forward = lambda batch: SimpleNamespace(hidden=jnp.concatenate([hidden, hidden]))  # noqa: E731
    batch = {"loss_mask": jnp.ones((2, 5))}
    loss, _ = duoattention(0.05).loss({"gates": jnp.ones((3, 2))}, State(), forward, batch, None)
    np.testing.assert_allclose(loss, 0.05, rtol=1e-6)
    assert distillation(hidden, hidden + 1, jnp.zeros((2, 5))) == 0
    np.testing.assert_allclose(distillation(hidden, hidden + 2, batch["loss_mask"]), 4, rtol=1e-6)


def test_gates_may_leave_the_upper_end(rng):
    np.testing.assert_array_equal(jax.grad(lambda a: clamp(a).sum())(jnp.asarray([-0.1, 0.0, 1.0, 1.1])), [0, 1, 1, 0])
    np.testing.assert_array_equal(clamp(jnp.asarray([-0.5, 0.3, 2.0])), np.float32([0, 0.3, 1]))


def test_schedule():
    rate = schedule(2000, 0.02)
    for s in (0, 10, 39, 40, 200, 399, 1000, 1600, 1700, 1990, 1999):
        want = 0.02 * min(1, max((s + 1) / 400, 0.1), max((2000 - s) / 400, 0.1))
        np.testing.assert_allclose(rate(s), want, rtol=1e-6)


def test_training_keeps_the_head_that_recalls_and_lets_the_local_one_stream():
    """Head 0 reads its own token where it stood long before; head 1 reads the token before this one."""
    n, d, rng = 32, 16, np.random.default_rng(0)
    kind = duoattention_streams(1, 4)

    def batch():
        first = rng.permutation(d)
        text = np.concatenate([first, first])  # the second half asks the first again
        return {"tokens": text[None].astype(np.int32), "loss_mask": (np.arange(n) >= d)[None].astype(np.float32)}

    place = jnp.asarray(rng.normal(size=(n + 1, d)), jnp.float32)

    def forward(model, gates, batch):
        x = jnp.eye(d)[batch["tokens"]]
        at = lambda shift: jnp.broadcast_to(place[shift : n + shift], x.shape)  # noqa: E731
        q, k = jnp.stack([x, at(0)], 2), jnp.stack([x, at(1)], 2)
        v = jnp.stack([jnp.broadcast_to(place[:n], x.shape), x], 2)  # where a token stood, and what it was
        call = Call(q * model, k, v, Meta.of(n), Meta.of(n), mask=causal())
        out = kind.apply({"gates": gates[0]}, State(), call, Ctx())[0].out
        return SimpleNamespace(hidden=out.reshape(*x.shape[:2], -1))

    batches = [batch() for _ in range(4)]
    model = jnp.float32(40.0)
    same, artifact = duoattention_gates(model, batches, forward=forward, shape=(1, 2), steps=120, learning_rate=0.05)
    assert same is model and artifact["gates"].shape == (1, 2)
    assert artifact["gates"][0, 1] < 0.1 < 0.5 < artifact["gates"][0, 0], artifact["gates"]
