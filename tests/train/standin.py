"""A model with the parameter names of the language model and a tenth of its mathematics, and a stream for it.

Run as a program it trains, so that a test can kill it.
"""

import argparse
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

V, C, H, F, L, T = 16, 8, 8, 16, 2, 8


def init(seed: int = 0, *, bias: bool = True):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)

    def linear(a, b):
        return {"kernel": normal(L, a, b), "bias": jnp.zeros((L, b))} if bias else {"kernel": normal(L, a, b)}

    layers = {
        "norm1": {"scale": jnp.ones((L, C))},
        "attn": {"q": linear(C, H), "k": linear(C, H), "v": linear(C, H), "o": linear(H, C)},
        "norm2": {"scale": jnp.ones((L, C))},
        "mlp": {"gate": linear(C, F), "up": linear(C, F), "down": linear(F, C)},
    }
    return {
        "embed": {"embedding": normal(V, C)},
        "layers": layers,
        "norm": {"scale": jnp.ones(C)},
        "head": {"kernel": normal(C, V)},
    }


def rms(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0.0)


def loss_fn(params, batch, key, *, noise: float = 0.02):
    """Next-token loss over the targets that count; a little noise on the embeddings makes the key matter."""
    x = params["embed"]["embedding"][batch["tokens"]]
    x = x + noise * jax.random.normal(key, x.shape, x.dtype)

    def layer(x, p):
        h = rms(x, p["norm1"]["scale"])
        q, k, v = (dense(h, p["attn"][name]) for name in "qkv")
        seen = jnp.cumsum(jax.nn.sigmoid(k) * v, axis=1) / jnp.arange(1, x.shape[1] + 1)[:, None]
        x = x + dense(jax.nn.sigmoid(q) * seen, p["attn"]["o"]).astype(x.dtype)
        h = rms(x, p["norm2"]["scale"])
        h = jax.nn.silu(dense(h, p["mlp"]["gate"])) * dense(h, p["mlp"]["up"])
        return x + dense(h, p["mlp"]["down"]).astype(x.dtype), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    logits = (rms(x, params["norm"]["scale"]) @ params["head"]["kernel"]).astype(jnp.float32)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
    weight = batch["loss_mask"].sum()
    loss = (nll * batch["loss_mask"]).sum() / weight
    return loss, {"weight": weight, "accuracy": ((logits.argmax(-1) == batch["targets"]) * 1.0).mean()}


class Stream:
    """Batch n is a function of seed and n; so is what comes after a state."""

    def __init__(self, batch: int = 8, *, seed: int = 0, sleep: float = 0.0):
        self.batch, self.seed, self.at, self.sleep = batch, seed, 0, sleep

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(self.sleep)
        rng = np.random.default_rng((self.seed, self.at))
        self.at += 1
        start, step = rng.integers(V, size=(2, self.batch, 1))
        tokens = ((start + step * np.arange(T + 1)) % V).astype(np.int32)
        mask = (rng.random((self.batch, T)) < 0.8).astype(np.float32)
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": mask}

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def main():
    from train.loop import INTERRUPTED, fit
    from train.optim import make_optimizer, schedule

    flags = argparse.ArgumentParser()
    flags.add_argument("out", type=Path)
    flags.add_argument("--steps", type=int, default=20)
    flags.add_argument("--save-every", type=int, default=1000)
    flags.add_argument("--sleep", type=float, default=0.0)
    a = flags.parse_args()
    result = fit(
        loss_fn,
        init(),
        Stream(sleep=a.sleep),
        optimizer=make_optimizer("muon", schedule("wsd", 0.02, steps=a.steps, warmup=3), weight_decay=0.01),
        steps=a.steps,
        checkpoint_dir=a.out / "checkpoints",
        save_every=a.save_every,
        keep=2,
        log_every=1,
        metrics_path=a.out / "metrics.jsonl",
    )
    sys.exit(INTERRUPTED if result.interrupted else 0)


if __name__ == "__main__":
    main()
