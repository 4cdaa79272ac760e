import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxattn.core import mask as masks
from pallas_kernels import gather as op
from pallas_kernels.gather import tpu
from tests.pallas_kernels.gather.calls import CALLS, call, check_hidden, compare

# Small ones: every copy of a unit is a call of the interpreter.
SMALL = {
    "every key, blocks part empty": CALLS["every key, one query of 4 heads, ragged"],
    "blocks of kv heads, live ranges, weights": dict(
        n=2, m=60, b=2, h=4, g=2, unit=8, hs=2, k=5, bounds=True, log_weight=True, key_bias=2, sums="kv"
    ),
    "pages of a pool": dict(n=1, m=64, b=2, h=2, g=1, d=16, unit=16, k=3, pool=True, valid=False, dtype=jnp.bfloat16),
    "decoding with tokens, by the tiles around them": dict(
        n=2, m=32, h=2, g=1, k=3, pos=True, rope="interleaved", sums="heads", bounds=True
    ),
    "token-level top-k, bfloat16": dict(n=3, m=20, h=4, g=1, d=8, own=True, k=5, valid=False, dtype=jnp.bfloat16),
    "short units, token by token": dict(n=2, m=21, h=2, g=1, unit=4, own=True, k=2, mask=masks.causal(), pos=True, rope="half"),
}


@pytest.mark.parametrize("name", SMALL)
def test_values_and_gradients_are_the_references(rng, name):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    o, opt = call(rng, **SMALL[name])
    params = pltpu.InterpretParams(detect_races=True)
    compare(lambda o, opt: tpu.gather(o, opt, interpret=params), o, opt, 2e-2 if o["q"].dtype == jnp.bfloat16 else 1e-5)
    assert not interpreter.races.races_found


def test_what_is_hidden_may_hold_anything(rng):
    check_hidden(rng, lambda o, opt: tpu.gather(o, opt, interpret=pltpu.InterpretParams()), lists=True)


def test_a_named_body_says_what_it_does_not_support(rng):
    o, opt = call(rng, n=2, m=16, k=3, dtype=jnp.float16)
    with pytest.raises(ValueError, match="'tpu' does not support q of float16"):
        op.gather(o, opt, "tpu")
    o, opt = call(rng, n=65, m=16, k=3)
    with pytest.raises(ValueError, match="'gpu' does not support 65 queries that share a list"):
        op.gather(o, opt, "gpu")
