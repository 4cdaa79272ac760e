"""SiT's feature recalibration distillation: a slimmed model learns to say, layer by layer, what all tokens would have been.

Behind every layer l of a slimmed model a reverse module R_l, which only training has, turns the M tokens into N again:
Y = MLP over the tokens (M -> 4 N -> N) of LN(X), then Y + MLP over the channels of LN(Y). With the teacher the same model
without slimming, whose weights the student starts from:

loss = task + 2 mean_l MSE(R_l(tokens_l), teacher's tokens_l) + 2 tau^2 KL(teacher || student) of the answers

Layers in front of the first slimming compare their tokens as they are; CLS is never compared.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxattn.core.losses import divergence
from jaxattn.core.maps import dense, init_dense, init_norm, normed
from jaxattn.core.types import Array, Need, State, contract, expect
from jaxattn.registry import register

WIDER = 4  # hidden units of both perceptrons, per output


def init_reverse(key, dim: int, rows: int, tokens: int) -> dict:
    """Parameters of a reverse module from ``rows`` tokens of ``dim`` channels to ``tokens``."""
    keys = jax.random.split(key, 4)
    wide = ((rows, WIDER * tokens), (WIDER * tokens, tokens), (dim, WIDER * dim), (WIDER * dim, dim))
    names = ("rows_up", "rows_down", "up", "down")
    maps = {name: init_dense(k, *shape, std=0.02) for k, name, shape in zip(keys, names, wide, strict=True)}
    return {"norm1": init_norm(dim), "norm2": init_norm(dim), **maps}


def reverse(p: dict, x: Array) -> Array:
    """Tokens x [B, M, C] -> [B, N, C]."""
    def mlp(up, down, x):
        return dense(p[down], jax.nn.gelu(dense(p[up], x), approximate=False))

    y = jnp.swapaxes(mlp("rows_up", "rows_down", jnp.swapaxes(normed(p["norm1"], x), 1, 2)), 1, 2)
    return y + mlp("up", "down", normed(p["norm2"], y))


def layer_tokens(outcome) -> list[Array]:
    """Tokens [B, N, C] behind each layer of the tower, slimmed where the next one gets them slimmed."""
    found = [outcome.evidence[f"hidden.{i}"] for i in range(sum(n.startswith("hidden.") for n in outcome.evidence))]
    return [*found[1:], outcome.rows["vision"].tokens("vision").x]


@contract
class _Recalibration:
    token: float = 2.0
    answer: float = 2.0
    tau: float = 1.0

    teacher = True
    rates = {"objective": 5.0}

    def check(self):
        for name in ("token", "answer"):
            expect(name, getattr(self, name), "at least 0", getattr(self, name) >= 0)
        expect("tau", self.tau, "above 0", self.tau > 0)

    def needs(self):
        return (Need("hidden", what="hidden", at="vision.*", through=True),)

    def init(self, key, outcome, teacher) -> dict:
        """{layer: parameters of its reverse module}, where there are fewer tokens than the teacher has."""
        made = {}
        for i, (mine, theirs) in enumerate(zip(layer_tokens(outcome), layer_tokens(teacher), strict=True)):
            if mine.shape != theirs.shape:
                made[str(i)] = init_reverse(jax.random.fold_in(key, i), mine.shape[2], mine.shape[1], theirs.shape[1])
        return made

    def loss(self, params: dict, state: State, forward, batch: dict, key) -> tuple[Array, dict]:
        out, dense_ = forward(batch), state.shared
        pairs = list(zip(layer_tokens(out), layer_tokens(dense_), strict=True))
        errors = []
        for i, (mine, theirs) in enumerate(pairs):
            mine = reverse(params[str(i)], mine) if str(i) in params else mine
            errors.append(jnp.mean(jnp.square(mine.astype(jnp.float32) - jax.lax.stop_gradient(theirs).astype(jnp.float32))))
        token = sum(errors) / len(errors)
        answer = divergence(out.logits, dense_.logits, out.weight, temperature=self.tau)
        loss = out.loss + self.token * token + self.answer * answer
        return loss, {**out.metrics, "token": token, "distilled": answer}


@register("objective")
def sit(token: float = 2.0, answer: float = 2.0, tau: float = 1.0):
    """Train a model with ``tokens.sit`` by feature recalibration.

    Args: token, answer: weights of the tokens' and of the answers' distance to the teacher.  tau: temperature of the answers.
    Reverse modules learn at 5 times the rate of the rest.
    """
    return _Recalibration(token, answer, tau)


__all__ = ["init_reverse", "layer_tokens", "reverse", "sit"]
