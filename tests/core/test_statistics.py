"""Every statistic against the plain map: own keys and cached Views, grouped heads, biases, Selections, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core import attend as attention
from jaxattn.core import mask as masks
from jaxattn.core import statistics
from jaxattn.core.attend import attend, attend_call, make_call
from jaxattn.core.select import from_mask
from jaxattn.core.types import Meta, View, contract

B, N, H, G, D = 2, 70, 4, 2, 8


@contract
class Softcap:
    """cap * tanh(logits / cap) times a per-head gain."""

    cap: float = 2.0

    def fields(self):
        return frozenset()

    def __call__(self, logits, q, k, row, key):
        return self.cap * jnp.tanh(logits * row["gain"] / self.cap)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(attention, "TILE", 32)
    monkeypatch.setattr(attention, "UNIT", 32)


def arrays(rng):
    t = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    return dict(
        q=t(B, N, H, D), k=t(B, N, G, D), kp=t(B, 19, G, D), kc=t(B, 9, 1, D), sink=t(H), bias=t(1, H, N, N),
        key_bias=t(B, N, G), gain=jnp.abs(t(1, 1, H)) + 0.5, size=jnp.abs(t(1, 19)) + 0.1,
    )  # fmt: skip


def full_call(x, *, own, kind="all"):
    """Own keys, a View of every kv head with token sizes, one of kv head 1 that hides own rows; everything at once."""
    rows, nineteen = np.arange(N)[None], np.arange(19)[None]
    valid = np.ones((1, N), bool)
    valid[:, [3, 40]] = False
    k_meta = Meta.of(N, pos=rows, valid=valid, kind=rows % 3)
    past = (
        View(x["kp"], x["kp"], Meta.of(19, pos=nineteen - 30, size=x["size"], kind=nineteen % 2)),
        View(x["kc"], x["kc"], Meta.of(9, pos=nineteen[:, :9] - 60, kind=nineteen[:, :9] * 0 + 2), own=own,
             heads=jnp.array([1])),
    )  # fmt: skip
    where = None
    if kind == "selected":
        active = jnp.asarray(np.random.default_rng(1).random((B, G, 5, 10)) < 0.5)
        where = from_mask(active, unit=7, tile=14)
    return make_call(
        x["q"], x["k"], x["k"], q_meta=Meta.of(N, pos=rows, kind=rows % 3), k_meta=k_meta, past=past, where=where,
        mask=masks.causal() & ~(masks.query_is("kind", 1) & masks.first(0)), sink_logit=x["sink"], bias=x["bias"],
        key={"bias": x["key_bias"]}, row={"gain": x["gain"]}, score_mod=Softcap(),
    )  # fmt: skip


def plain_map(x, own, temperature=1.0, kind="all"):
    """Probabilities [B, H, N, N + 19 + 9] by hand, kv head 0 not seeing the last nine, and the sink's."""
    cap = lambda s: 2.0 * jnp.tanh(s * x["gain"][0, 0][:, None, None] / 2.0)  # noqa: E731
    rep = lambda k: jnp.repeat(k, H // k.shape[2], axis=2)  # noqa: E731
    s = lambda k: cap(jnp.einsum("bnhd,bmhd->bhnm", x["q"], k) * D**-0.5)  # noqa: E731
    i, j = np.arange(N)[:, None], np.arange(N)[None]
    seen = (j <= i) & ~np.isin(j, [3, 40])
    seen = jnp.asarray(seen) & jnp.moveaxis(own, 2, 1)[..., None]
    if kind == "selected":
        active = np.random.default_rng(1).random((B, G, 5, 10)) < 0.5
        seen &= jnp.asarray(np.repeat(np.repeat(np.repeat(active, 14, 2), 7, 3), H // G, 1))
    first = s(rep(x["k"])) + x["bias"] + jnp.moveaxis(rep(x["key_bias"]), 1, 2)[:, :, None]
    first = jnp.where(seen, first, -jnp.inf)
    second = s(rep(x["kp"])) + jnp.log(x["size"])
    third = jnp.where((jnp.arange(H) >= H // G)[:, None, None], s(jnp.repeat(x["kc"], H, axis=2)), -jnp.inf)
    cached = jnp.asarray(i % 3 != 1)  # query rows of kind 1 do not see positions below 0
    second, third = (jnp.where(cached, a, -jnp.inf) for a in (second, third))
    sink = jnp.broadcast_to(x["sink"][:, None, None], (B, H, N, 1))
    return jax.nn.softmax(jnp.concatenate([first, second, third, sink], -1) / temperature, -1)


def close(a, b, tol=2e-5):
    np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("kind", ["all", "selected"])
def test_every_statistic_is_a_reduction_of_the_map(rng, kind):
    x, own = arrays(rng), jnp.asarray(rng.random((B, N, H)) < 0.8)
    w = jnp.asarray(rng.random((B, N, H)), jnp.float32)
    index = jnp.asarray(rng.integers(0, N, (B, 5)))

    @jax.jit
    def found(x, own, w, index):
        call = full_call(x, own=own, kind=kind)
        lse = attend_call(call)[0].lse
        return dict(
            lse=lse, mass=statistics.log_mass(call), received=statistics.received(call, lse, w),
            few=statistics.rows(call, index, lse), alone=statistics.rows(call, index),
            few_logits=statistics.row_logits(call, index), entropy=statistics.entropy(call, lse),
            distance=statistics.distance(call, lse), masses=statistics.masses(call, "kind", 3, lse),
            picked=statistics.received(statistics.rows_call(call, index), None, jnp.ones((1, 5))),
        )  # fmt: skip

    got = found(x, own, w, index)
    p = plain_map(x, own, kind=kind)
    ends = [N, N + 19, N + 28]
    close(got["mass"], got["lse"])

    def parts(full):  # [..., all keys] -> own, View, View of kv head 1
        first, second, third, _ = jnp.split(full, ends, -1)
        return first, second, third[:, H // G :]

    own_sum, past_sum = got["received"]
    for a, b in zip((own_sum, *past_sum), parts(jnp.einsum("bhnm,bnh->bhm", p, w)), strict=True):
        close(a, b)
    few = parts(jnp.take_along_axis(p, index[:, None, :, None], axis=2))
    for name in ("few", "alone"):
        for a, b in zip((got[name][0], *got[name][1]), few, strict=True):
            close(a, b)
    for a, b in zip((got["few_logits"][0], *got["few_logits"][1]), few, strict=True):
        np.testing.assert_array_equal(jnp.isneginf(a), b == 0)
    for a, b in zip((got["picked"][0], *got["picked"][1]), few, strict=True):
        close(a, b.sum(2))
    rows_last = lambda a: jnp.moveaxis(a, 1, 2)  # noqa: E731
    close(got["entropy"], rows_last(-jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0), -1)))
    pos = np.concatenate([np.arange(N), np.arange(19) - 30, np.arange(9) - 60])
    close(got["distance"], rows_last(jnp.sum(p[..., :-1] * (np.arange(N)[:, None] - pos), -1)), 1e-4)
    kind_of = np.concatenate([np.arange(N) % 3, np.arange(19) % 2, np.full(9, 2)])
    close(got["masses"], rows_last(jnp.einsum("bhnm,mc->bhnc", p[..., :-1], jnp.asarray(np.eye(3)[kind_of]))))


def test_gradients_of_received_and_entropy_and_temperature(rng):
    x, own = arrays(rng), jnp.asarray(rng.random((B, N, H)) < 0.8)
    w = jnp.asarray(rng.random((B, N)), jnp.float32)
    c = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((B, H, N), (B, H, 19), (B, H // G, 9), (B, N, H))]

    def fast(x, w, temperature=0.7):
        call = full_call(x, own=own)
        mine, past = statistics.received(call, None, w, temperature=temperature)
        ent = statistics.entropy(call, attend_call(call)[0].lse)
        return sum(jnp.sum(jnp.sin(a) * b) for a, b in zip((mine, *past, ent), c, strict=True))

    def slow(x, w, temperature=0.7):
        full = jnp.einsum("bhnm,bn->bhm", plain_map(x, own, temperature), w)
        first, second, third, _ = jnp.split(full, [N, N + 19, N + 28], -1)
        p = plain_map(x, own)
        ent = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0), -1)
        found = (first, second, third[:, H // G :], jnp.moveaxis(ent, 1, 2))
        return sum(jnp.sum(jnp.sin(a) * b) for a, b in zip(found, c, strict=True))

    (a, ga), (b, gb) = (jax.jit(jax.value_and_grad(f, (0, 1)))(x, w) for f in (fast, slow))
    close(a, b, 1e-4)
    for (path, g), want in zip(jax.tree_util.tree_leaves_with_path(ga), jax.tree.leaves(gb), strict=True):
        scale = float(jnp.abs(want).max()) + 1e-6
        np.testing.assert_allclose(g / scale, want / scale, atol=2e-4, err_msg=str(path))


def test_lse_and_weights_have_gradients_of_their_own(rng):
    q, k = (jnp.asarray(rng.normal(size=(1, 40, 2, 4)), jnp.float32) for _ in range(2))
    call = make_call(q, k, k, mask=masks.causal())
    lse = jax.jit(lambda q, k: attend(q, k, k, mask=masks.causal()).lse)(q, k)
    w = jnp.asarray(rng.random((1, 40, 2)), jnp.float32)
    weigh = jnp.asarray(rng.normal(size=(1, 2, 40)), jnp.float32)

    def slow(lse, w):
        s = jnp.einsum("bnhd,bmhd->bhnm", q, k) / 2
        p = jnp.where(np.tri(40, dtype=bool), jnp.exp(s - jnp.moveaxis(lse, 2, 1)[..., None]), 0)
        return jnp.einsum("bhnm,bnh,bhm->", p, w, weigh)

    got = jax.jit(jax.grad(lambda lse, w: jnp.sum(statistics.received(call, lse, w)[0] * weigh), (0, 1)))(lse, w)
    for a, b in zip(got, jax.jit(jax.grad(slow, (0, 1)))(lse, w), strict=True):
        close(a, b, 1e-4)


def test_rows_that_see_nothing_give_nothing(rng):
    q, k = (jnp.asarray(rng.normal(size=(1, 12, 2, 4)), jnp.float32) for _ in range(2))
    meta = Meta.of(12, valid=np.arange(12)[None] >= 4)  # rows 0..3 see no valid key under the causal mask
    w = jnp.ones((1, 12))

    def run(q, k):
        call = make_call(q, k, k, k_meta=meta, mask=masks.causal())
        lse = attend_call(call)[0].lse
        found = statistics.received(call, lse, w)[0]
        few = statistics.rows(call, jnp.array([[0, 5]]))[0]
        return found.sum() + statistics.entropy(call, lse).sum(), (found, lse, few)

    (_, (found, lse, few)), grads = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(q, k)
    assert (lse[:, :4] == -jnp.inf).all() and (few[:, :, 0] == 0).all()
    close(found.sum(-1), jnp.full((1, 2), 8.0))  # eight rows of mass one
    assert (found[..., :4] == 0).all()
    assert all(bool(jnp.isfinite(g).all()) for g in grads) and (grads[0][:, :4] == 0).all()


def test_invalid_rows_do_not_count(rng):
    q, k = (jnp.asarray(rng.normal(size=(1, 12, 2, 4)), jnp.float32) for _ in range(2))

    @jax.jit
    def run(q, k):
        call = make_call(q, k, k, q_meta=Meta.of(12, valid=np.arange(12)[None] < 7))
        padded = statistics.received(call, None, jnp.ones((1, 12)))[0]
        return padded, statistics.received(make_call(q[:, :7], k, k), None, jnp.ones((1, 7)))[0]

    close(*run(q, k))


def test_iterated_is_power_iteration(rng):
    q, k = (jnp.asarray(rng.normal(size=(1, 70, 2, 4)), jnp.float32) for _ in range(2))
    call = make_call(q, k, k)
    d = jnp.full((1, 70), 1 / 70)
    p = jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", q, k) / 2 / 0.1, -1)
    want = jnp.broadcast_to(d[:, None], (1, 2, 70))
    for _ in range(5):
        want = jnp.einsum("bhn,bhnm->bhm", want, p)
    got = jax.jit(statistics.iterated, static_argnums=(2, 3))(call, d, 5, 0.1)
    close(got, want)
    close(got.sum(-1), jnp.ones((1, 2)))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_profile_matches_flexprefill(golden, implementation):
    g = golden("139-flexprefill")
    last = int(g["block_size"])
    run = jax.jit(lambda q, k: statistics.profile(q, k, last, implementation=implementation))
    vertical, slash = run(jnp.asarray(g["q"]), jnp.asarray(g["k"]))
    np.testing.assert_allclose(vertical, g["vertical"], atol=1e-6)
    np.testing.assert_allclose(slash, g["slash"], atol=1e-6)


def test_profile_at_odd_lengths_and_in_gradient(rng):
    from pallas_kernels.profile import reference, xla

    r, m = 7, 61
    q, k = (jnp.asarray(rng.normal(size=(2, n, h, 4)), jnp.float32) for n, h in ((r, 4), (m, 2)))
    lse = jnp.asarray(rng.normal(size=(2, r, 4)), jnp.float32) + 4
    a, b = (jnp.asarray(rng.normal(size=(2, 4, m)), jnp.float32) for _ in range(2))

    def loss(f, **kw):
        def run(q, k, lse):
            v, s = f({"q": q, "k": k, "lse": lse}, 0.5, **kw)
            return jnp.sum(a * v) + jnp.sum(b * s * s), (v, s)

        return jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(q, k, lse)

    want = jax.tree.leaves(loss(reference.diagonals))
    for unit in (8, 61, 512):
        for x, y in zip(jax.tree.leaves(loss(xla.diagonals, unit=unit)), want, strict=True):
            close(x, y, 1e-4)


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (lambda c: statistics.received(c, None, jnp.ones((1, 5))), "weights"),
        (lambda c: statistics.received(c, jnp.zeros((1, 5, 2)), jnp.ones((1, 6))), "lse"),
        (lambda c: statistics.rows(c, jnp.zeros(3, int)), "index"),
        (lambda c: statistics.received(c.replace(normalizer="l1"), None, jnp.ones((1, 6))), "call.normalizer"),
        (lambda c: statistics.iterated(c.replace(k=c.k[:, :5]), jnp.ones((1, 6)), 2), "call"),
        (lambda c: statistics.profile(c.q, c.k, 7), "last"),
    ],
)
def test_bad_input_is_named(run, name):
    x = jnp.zeros((1, 6, 2, 4))
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        run(make_call(x, x, x))
