import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core.rope import Rope, RopeScaling, lrpe, lrpe_theta, rope_frequencies, rotate

B, N, H, D = 2, 5, 4, 12
rng = np.random.default_rng(0)
X = rng.normal(size=(B, N, H, D)).astype(np.float32)
POS = rng.integers(0, 50, size=(B, N))


def turned(x, angle, layout, r):
    """Independent form: complex multiplication."""
    first, second = slice(0, r), slice(r, 2 * r)
    if layout == "interleaved":
        first, second = slice(0, 2 * r, 2), slice(1, 2 * r, 2)
    z = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angle)
    out = x.copy()
    out[..., first], out[..., second] = z.real, z.imag
    return out


@pytest.mark.parametrize("layout", ("half", "interleaved"))
@pytest.mark.parametrize("dim", (12, 8))
def test_rotation_partial_and_whole(layout, dim):
    rope = Rope(dim, layout=layout)
    freqs = 10000.0 ** (-np.arange(0, dim, 2) / dim)
    np.testing.assert_allclose(rope.frequencies(), freqs, rtol=1e-6)
    out = rope.apply(X, POS)
    np.testing.assert_allclose(out, turned(X, POS[..., None, None] * freqs, layout, dim // 2), atol=2e-5)
    np.testing.assert_array_equal(out[..., dim:], X[..., dim:])
    np.testing.assert_allclose(rope.apply(X, POS[0]), rope.apply(X, POS[:1]), atol=0)


def test_composition_and_relative_positions():
    offset = np.array([[3.5], [-7.0]])
    for rope in (Rope(12), Rope(8, layout="interleaved", scaling=RopeScaling("yarn", 4, 32))):
        moved = rope.shift(rope.apply(X, POS), np.broadcast_to(offset, POS.shape))
        np.testing.assert_allclose(moved, rope.apply(X, POS + offset), atol=5e-5)
        q, k = rope.apply(X, POS), rope.apply(X[:, ::-1], POS)
        q2, k2 = rope.apply(X, POS + 11), rope.apply(X[:, ::-1], POS + 11)
        dots = [np.einsum("bthd,bshd->bhts", a, b) for a, b in ((q, k), (q2, k2))]
        np.testing.assert_allclose(*dots, atol=2e-4)


def test_sections():
    pos = rng.integers(0, 20, size=(B, N, 3))
    rope = Rope(12, sections=(2, 3, 1), layout="interleaved")
    out = rope.apply(X, pos)
    start = 0
    for axis, pairs in enumerate((2, 3, 1)):  # a 1-D rotary on the channels of its axis
        part = X[..., start : start + 2 * pairs]
        want = Rope(2 * pairs, layout="interleaved").apply(part, pos[..., axis])
        np.testing.assert_allclose(out[..., start : start + 2 * pairs], want, atol=1e-5)
        start += 2 * pairs
    for spectrum in ("axis", "shared"):
        time = np.stack([POS, 0 * POS, 0 * POS], -1)
        rope = Rope(12, sections=(2, 2, 2), spectrum=spectrum)
        freqs = np.where(np.arange(6) < 2, rope.frequencies(), 0)
        np.testing.assert_allclose(rope.apply(X, time), rotate(X, POS, freqs), atol=1e-6)
    # the shared spectrum with equal positions on all axes is the 1-D embedding
    same = np.broadcast_to(POS[..., None], (B, N, 3))
    np.testing.assert_allclose(rope.apply(X, same), Rope(12).apply(X, POS), atol=1e-6)
    np.testing.assert_allclose(rope.apply(X, POS), Rope(12).apply(X, POS), atol=1e-6)


def test_positions_per_head():
    rope = Rope(12)
    pos = rng.uniform(0, 30, size=(B, 2, N)).astype(np.float32)
    out = rope.apply(X, pos, per_head=True)
    for g in range(2):
        heads = slice(2 * g, 2 * g + 2)
        np.testing.assert_allclose(out[:, :, heads], rope.apply(X[:, :, heads], pos[:, g]), atol=1e-6)
    axial = Rope(12, sections=(3, 3))
    both = rng.integers(0, 9, size=(B, 4, N, 2))
    out = axial.apply(X, both, per_head=True)
    np.testing.assert_allclose(out[:, :, 3:], axial.apply(X[:, :, 3:], both[:, 3]), atol=1e-6)


def test_scaled_frequencies():
    plain, dim = 10000.0 ** (-np.arange(0, 64, 2) / 64), 64
    np.testing.assert_allclose(rope_frequencies(dim, scaling=RopeScaling("linear", 4)), plain / 4, rtol=1e-6)

    dynamic = RopeScaling("dynamic", 2, 128)
    np.testing.assert_allclose(rope_frequencies(dim, scaling=dynamic, length=100), plain, rtol=1e-6)
    base = 10000.0 * (2 * 512 / 128 - 1) ** (64 / 62)
    want = base ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(rope_frequencies(dim, scaling=dynamic, length=512), want, rtol=1e-6)
    traced = jax.jit(lambda n: rope_frequencies(dim, scaling=dynamic, length=n))(512)
    np.testing.assert_allclose(traced, want, rtol=1e-5)

    llama = rope_frequencies(dim, scaling=RopeScaling("llama3", 8, 1024))
    for f, g in zip(plain, llama, strict=True):
        wavelength = 2 * math.pi / f
        smooth = (1024 / wavelength - 1) / 3
        want = f if wavelength < 256 else f / 8 if wavelength > 1024 else (1 - smooth) * f / 8 + smooth * f
        np.testing.assert_allclose(g, want, rtol=1e-6)

    scaling = RopeScaling("yarn", 4, 1024)
    yarn = rope_frequencies(dim, scaling=scaling)
    turns = 1024 * plain / (2 * math.pi)
    np.testing.assert_allclose(yarn[turns > 40], plain[turns > 40], rtol=1e-6)
    np.testing.assert_allclose(yarn[turns < 0.7], plain[turns < 0.7] / 4, rtol=1e-6)
    assert (np.diff(yarn / plain) <= 1e-6).all()
    assert scaling.attention_scaling == pytest.approx(0.1 * math.log(4) + 1)
    assert RopeScaling("yarn", 4, 1024, mscale=1.0, mscale_all_dim=1.0).attention_scaling == 1.0
    out = Rope(12, scaling=scaling).apply(X, 0 * POS)
    np.testing.assert_allclose(out, X * scaling.attention_scaling, rtol=1e-5)


def test_published_values():
    """Pairs of two released configurations, computed by transformers: Llama 3.1 8B, Qwen2.5 with yarn."""
    pairs = [0, 20, 30, 40, 63]
    llama = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    got = rope_frequencies(128, 500000.0, RopeScaling.from_config(llama))[pairs]
    np.testing.assert_allclose(got, LLAMA, rtol=2e-6)
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    got = rope_frequencies(128, 1e6, RopeScaling.from_config(yarn))[pairs]
    np.testing.assert_allclose(got, YARN, rtol=2e-6)


LLAMA = [1.0, 0.016560441, 0.0013718937, 3.4281024e-05, 3.0689259e-07]
YARN = [1.0, 0.013335215, 0.001064361, 4.4456985e-05, 3.1023444e-07]


def test_record_is_a_value():
    config = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64}
    a = Rope(8, 10000, sections=[2, 2], scaling=config)
    b = Rope(8, 10000.0, sections=(2, 2), scaling=dict(config))
    assert a == b and hash(a) == hash(b) and a != Rope(8)
    assert RopeScaling("linear", 1.1) == RopeScaling("linear", np.float32(1.1))
    traces = []
    f = jax.jit(lambda r, x, p: (traces.append(1), r.apply(x, p))[1], static_argnums=0)
    f(a, X, POS), f(b, X, POS)
    assert len(traces) == 1
    assert RopeScaling.from_config({"rope_type": "default"}) is None and RopeScaling.from_config(None) is None
    assert Rope(8).apply(X.astype(jnp.bfloat16), POS).dtype == jnp.bfloat16


def test_longrope_has_two_spectra():
    """A divisor per pair, by the length; q and k grow with the logarithm of the extension."""
    short, long = (1.0, 1.5, 2.0, 4.0), (2.0, 3.0, 5.0, 9.0)
    rope = Rope(8, scaling=RopeScaling("longrope", 4.0, 16, short_factor=short, long_factor=list(long)))
    plain = Rope(8).frequencies()
    for length, divisors in ((None, short), (16, short), (17, long)):
        np.testing.assert_allclose(rope.frequencies(length), plain / np.array(divisors), rtol=1e-6)
    traced = jax.jit(rope.frequencies)
    for length in (16, 17):
        np.testing.assert_array_equal(traced(jnp.int32(length)), rope.frequencies(length))
    np.testing.assert_allclose(rope.attention_scaling, math.sqrt(1 + math.log(4) / math.log(16)), rtol=1e-6)
    given = RopeScaling("longrope", 4.0, 16, attention_factor=1.25, short_factor=short, long_factor=long)
    assert given.attention_scaling == 1.25 and RopeScaling("longrope", 1.0, 16, short_factor=short, long_factor=long).by_length
    with pytest.raises(ValueError, match="short_factor: expected a number for each of 6 pairs, got 4"):
        Rope(12, scaling=given).frequencies()


def test_lrpe_is_relative():
    theta = lrpe_theta(H, D)
    np.testing.assert_allclose(theta.reshape(-1)[[0, 6]], [1.0, 10000.0 ** (-12 / 48)], rtol=1e-6)
    q, k = lrpe(X, POS, theta), lrpe(X[:, ::-1], np.arange(N), theta)
    lag = (POS[:, :, None] - np.arange(N))[..., None, None] * theta
    want = np.einsum("bthd,bshd,btshd->bhts", X, X[:, ::-1], np.cos(lag))
    np.testing.assert_allclose(np.einsum("bthd,bshd->bhts", q, k), want, atol=1e-4)
    grad = jax.grad(lambda t: jnp.sum(lrpe(X, POS, t) ** 3))(jnp.asarray(theta))
    assert np.isfinite(grad).all() and np.abs(grad).max() > 0


def test_errors_name_the_argument():
    for name, call in {
        "dim": lambda: Rope(7),
        "layout": lambda: Rope(8, layout="pairs"),
        "sections": lambda: Rope(8, sections=(1, 1)),
        "kind": lambda: RopeScaling("spiral", 2, 8),
        "original_length": lambda: RopeScaling("yarn", 2),
        "short_factor, long_factor": lambda: RopeScaling("longrope", 2, 8),
        "x": lambda: Rope(14).apply(X, POS),
        "pos": lambda: Rope(12).apply(X, POS[:, :3]),
        "axes": lambda: rotate(X, POS, np.ones(6), axes=(0, 1)),
        "theta": lambda: lrpe(X, POS, np.ones(5)),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}:"):
            call()
