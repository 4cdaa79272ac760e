"""Rotary position embeddings: 1-D to 3-D positions, partial rotation, context extension, re-rotation, LRPE.

Pair i of a head's channels is turned by the angle pos * freqs[i], so that q.k depends on positions by their
difference (RoFormer, arXiv:2104.09864). Rotations compose: a key rotated at p and again by d is the key
rotated at p + d, which is all that moving cached keys needs.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

KINDS = ("linear", "dynamic", "llama3", "yarn", "longrope")


def _float32(x):
    return float(np.float32(x))  # records made from float32 and from Python numbers are then equal


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Context extension: how the frequencies change, in the terms of Hugging Face `rope_parameters`.

    kind "linear": positions / factor (arXiv:2306.15595). "dynamic": the base grows with the length beyond
    original_length (dynamic NTK). "llama3": long wavelengths / factor, short ones untouched, a ramp between.
    "yarn": the same idea by the number of turns within original_length, and attention_scaling on q and k
    (arXiv:2309.00071). "longrope": a divisor per pair, short_factor up to original_length and long_factor beyond, and
    attention_scaling (arXiv:2402.13753).
    """

    kind: str
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple = ()
    long_factor: tuple = ()

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {KINDS}, got {self.kind!r}")
        if self.kind != "linear" and self.original_length <= 0:
            raise ValueError(f"original_length: {self.kind!r} needs a length, got {self.original_length}")
        if self.kind == "linear":  # reads no length: records that turn alike are equal
            object.__setattr__(self, "original_length", 0)
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name.endswith("_factor") and isinstance(value, list | tuple):
                object.__setattr__(self, f.name, tuple(map(_float32, value)))
            elif value is not None and f.name not in ("kind", "truncate", "original_length"):
                object.__setattr__(self, f.name, _float32(value))
        if (self.kind == "longrope") != bool(self.short_factor) or len(self.short_factor) != len(self.long_factor):
            raise ValueError("short_factor, long_factor: expected as many numbers in both with 'longrope' and none otherwise, "
                             f"got {len(self.short_factor)} and {len(self.long_factor)} with {self.kind!r}")

    @classmethod
    def from_config(cls, config, max_length=None):
        """From a `rope_scaling` / `rope_parameters` dict of a checkpoint; None for plain rotary.

        max_length: the checkpoint's max_position_embeddings, used where the dict leaves out the original
            length or the factor.
        """
        kind = (config or {}).get("rope_type", (config or {}).get("type", "default"))
        if kind in ("default", "mrope"):  # mrope changes which position a pair reads, not its frequency
            return None
        known = {f.name for f in dataclasses.fields(cls)} - {"kind"}
        fields = {n: config[n] for n in known if config.get(n) is not None}
        original = config.get("original_max_position_embeddings") or max_length or 0
        if "factor" not in fields and original and max_length:
            fields["factor"] = max_length / original
        return cls(kind, original_length=int(original), **fields)

    @property
    def by_length(self):
        """Whether the frequencies depend on the tokens seen so far."""
        return self.kind in ("dynamic", "longrope")

    @property
    def attention_scaling(self):
        """Factor on the rotated channels of q and of k (1 except for yarn and longrope)."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "longrope":
            return 1.0 if self.factor <= 1 else math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))

        def temperature(m):
            return 1.0 if self.factor <= 1 else 0.1 * m * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return temperature(self.mscale) / temperature(self.mscale_all_dim)
        return temperature(1.0)


def rope_frequencies(dim, base=10000.0, scaling=None, *, length=None):
    """Angle per unit of position of each channel pair.

    Args:
        dim: rotated channels, even.
        base: base of the geometric series, base^(-2i/dim).
        scaling: RopeScaling, a checkpoint's dict, or None.
        length: tokens seen so far, an int or a traced scalar; only "dynamic" and "longrope" read it (None: the
            original length).

    Returns:
        float32 [dim // 2]; a numpy constant, or a jax array where length is one.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim: expected an even number of rotated channels, got {dim}")
    if isinstance(scaling, dict):
        scaling = RopeScaling.from_config(scaling)
    exponent = np.arange(0, dim, 2) / dim
    if scaling is None:
        return (base**-exponent).astype(np.float32)
    if scaling.kind == "dynamic":
        return _dynamic(dim, base, scaling, length, exponent)
    if scaling.kind == "longrope":
        return _longrope(dim, base, scaling, length, exponent)
    freqs, factor = base**-exponent, scaling.factor
    if scaling.kind == "linear":
        freqs = freqs / factor
    elif scaling.kind == "llama3":
        turns = scaling.original_length * freqs / (2 * math.pi)  # full turns within the trained length
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0, 1)
        freqs = freqs * (keep + (1 - keep) / factor)
    else:
        freqs = freqs * _yarn_blend(dim, base, scaling)
    return freqs.astype(np.float32)


def _dynamic(dim, base, scaling, length, exponent):
    trained, factor = scaling.original_length, scaling.factor
    if length is None or isinstance(length, int | np.integer):
        xp, length = np, max(length or 0, trained)
    else:
        xp, length = jnp, jnp.maximum(length, trained)
    grown = base * (factor * length / trained - (factor - 1)) ** (dim / (dim - 2)) if dim > 2 else base
    return xp.asarray(grown ** -xp.asarray(exponent), xp.float32)


def _longrope(dim, base, scaling, length, exponent):
    if len(scaling.short_factor) != dim // 2:
        raise ValueError(f"short_factor: expected a number for each of {dim // 2} pairs, got {len(scaling.short_factor)}")
    short, long = ((base**-exponent / np.asarray(f)).astype(np.float32) for f in (scaling.short_factor, scaling.long_factor))
    if length is None or isinstance(length, int | np.integer):
        return long if (length or 0) > scaling.original_length else short
    return jnp.where(length > scaling.original_length, long, short)


def _yarn_blend(dim, base, scaling):
    def channel(turns):  # the (fractional) pair that makes this many turns within the trained length
        return dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    slow = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0, 1)
    return (1 - slow) + slow / scaling.factor


def rotate(x, pos, freqs, *, layout="half", axes=None, per_head=False, scale=1.0):
    """Rotates channel pairs of x by pos * freqs.

    Args:
        x: [B, N, H, D]. The first 2 R channels are rotated, R = len(freqs); the rest passes through.
        pos: int or float positions: [N], [B|1, N], or [B|1, N, A] with `axes`. With per_head=True one more
            axis of kv heads before the tokens, [B|1, G, N] or [B|1, G, N, A], H a multiple of G (the layout
            of Meta in caches).
        freqs: [R].
        layout: "half" pairs channels (i, i + R) (Llama), "interleaved" (2i, 2i + 1) (GPT-J, RoFormer).
        axes: R ints, the position axis that each pair reads; None for 1-D positions. Positions without the
            axis A stand for the same number on every axis (text in a multimodal model).
        scale: factor on the rotated channels (yarn's attention_scaling).

    Returns:
        The dtype and shape of x; angles are computed in at least float32.
    """
    r = len(freqs)
    if layout not in ("half", "interleaved"):
        raise ValueError(f"layout: expected 'half' or 'interleaved', got {layout!r}")
    if x.ndim != 4 or x.shape[-1] < 2 * r:
        raise ValueError(f"x: expected [B, N, H, D] with D >= {2 * r} rotated channels, got {x.shape}")
    dtype = jnp.result_type(jnp.float32, x.dtype)
    angle = _angles(x, jnp.asarray(pos), jnp.asarray(freqs, dtype), axes, per_head, dtype)
    cos, sin = jnp.cos(angle) * scale, jnp.sin(angle) * scale
    turned = x[..., : 2 * r].astype(dtype)
    if layout == "half":
        a, b = turned[..., :r], turned[..., r:]
        out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turned.shape)
    return jnp.concatenate([out.astype(x.dtype), x[..., 2 * r :]], axis=-1)


def _angles(x, pos, freqs, axes, per_head, dtype):
    """[B|1, N, H|1, R]."""
    pos = pos[None] if pos.ndim == 1 and not per_head else pos
    plain = 3 if per_head else 2
    if axes is not None and len(axes) != len(freqs):
        raise ValueError(f"axes: expected one axis for each of {len(freqs)} pairs, got {len(axes)}")
    if pos.ndim not in ((plain,) if axes is None else (plain, plain + 1)):
        want = "[B, G, N" if per_head else "[B, N"
        raise ValueError(f"pos: expected {want}]{'' if axes is None else f' or {want}, A]'}, got {pos.shape}")
    if pos.ndim == plain:
        angle = pos.astype(dtype)[..., None] * freqs
    else:
        if max(axes) >= pos.shape[-1]:
            raise ValueError(f"pos: axes read {max(axes) + 1} position axes, got {pos.shape}")
        angle = pos.astype(dtype)[..., np.asarray(axes)] * freqs
    if not per_head:
        tokens, angle = angle.shape[1], angle[:, :, None]
    else:
        groups, tokens = angle.shape[1:3]
        if x.shape[2] % groups:
            raise ValueError(f"pos: expected a number of heads that divides {x.shape[2]}, got {pos.shape}")
        angle = jnp.repeat(jnp.moveaxis(angle, 1, 2), x.shape[2] // groups, axis=2)
    if tokens not in (1, x.shape[1]) or angle.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"pos: expected B, N = {x.shape[:2]} as in x, got {pos.shape}")
    return angle


@dataclasses.dataclass(frozen=True)
class Rope:
    """A rotary embedding as a value: compared and hashed by its fields.

    Attributes:
        dim: rotated channels of a head (fewer than head_dim: partial rotary).
        base: base of the frequencies.
        layout: "half" | "interleaved", see `rotate`.
        sections: pairs per position axis, summing to dim // 2; () for 1-D positions.
        spectrum: with sections, "axis": every axis has its own series over its own channels (vision
            transformers, video diffusion); "shared": one series over dim, cut into the sections (Qwen2-VL's
            M-RoPE).
        scaling: RopeScaling, a checkpoint's dict, or None.
    """

    dim: int
    base: float = 10000.0
    layout: str = "half"
    sections: tuple = ()
    spectrum: str = "axis"
    scaling: RopeScaling | None = None

    def __post_init__(self):
        object.__setattr__(self, "base", _float32(self.base))
        object.__setattr__(self, "sections", tuple(int(s) for s in self.sections))
        if isinstance(self.scaling, dict):
            object.__setattr__(self, "scaling", RopeScaling.from_config(self.scaling))
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"dim: expected an even number of rotated channels, got {self.dim}")
        if self.layout not in ("half", "interleaved"):
            raise ValueError(f"layout: expected 'half' or 'interleaved', got {self.layout!r}")
        if self.spectrum not in ("axis", "shared"):
            raise ValueError(f"spectrum: expected 'axis' or 'shared', got {self.spectrum!r}")
        if self.sections and sum(self.sections) != self.dim // 2:
            raise ValueError(f"sections: expected pairs that sum to {self.dim // 2}, got {self.sections}")

    @property
    def axes(self):
        """Position axis of each pair, or None for 1-D positions."""
        return tuple(a for a, n in enumerate(self.sections) for _ in range(n)) or None

    @property
    def attention_scaling(self):
        return 1.0 if self.scaling is None else self.scaling.attention_scaling

    def frequencies(self, length=None):
        """float32 [dim // 2]; `length` as in `rope_frequencies`."""
        if not self.sections or self.spectrum == "shared":
            return rope_frequencies(self.dim, self.base, self.scaling, length=length)
        parts = [rope_frequencies(2 * n, self.base, self.scaling, length=length) for n in self.sections if n]
        return (np if all(isinstance(p, np.ndarray) for p in parts) else jnp).concatenate(parts)

    def apply(self, x, pos, *, length=None, per_head=False):
        """Rotates x [B, N, H, D] at pos (see `rotate`) and applies the attention scaling."""
        return self._rotate(x, pos, length, per_head, self.attention_scaling)

    def shift(self, x, offset, *, length=None, per_head=False):
        """Moves rows that were already rotated: shift(apply(x, p), d) = apply(x, p + d).

        offset: as pos; a difference of positions. Not defined across a change of `length` of a dynamic
            scaling.
        """
        return self._rotate(x, offset, length, per_head, 1.0)

    def _rotate(self, x, pos, length, per_head, scale):
        return rotate(
            x,
            pos,
            self.frequencies(length),
            layout=self.layout,
            axes=self.axes,
            per_head=per_head,
            scale=scale,
        )


def lrpe(x, pos, theta):
    """Linearized relative position encoding with learned angles (LRPE, as in TransNormerLLM,
    arXiv:2307.14995).

    q.k of two encoded rows is sum_i q_i k_i cos((t - s) theta_i), so it fits linear attention.

    Args:
        x: [B, N, H, D]. pos: [N] or [B|1, N]. theta: [H|1, D] or [D].

    Returns:
        [B, N, H, 2 D] in the dtype of x: cosine parts, then sine parts.
    """
    if theta.ndim not in (1, 2) or theta.shape[-1] != x.shape[-1]:
        raise ValueError(f"theta: expected [H, {x.shape[-1]}] or [{x.shape[-1]}], got {theta.shape}")
    dtype = jnp.result_type(jnp.float32, x.dtype)
    pos = jnp.asarray(pos, dtype)
    pos = pos[None] if pos.ndim == 1 else pos
    angle = pos[:, :, None, None] * theta.astype(dtype)
    x_ = x.astype(dtype)
    return jnp.concatenate([x_ * jnp.cos(angle), x_ * jnp.sin(angle)], axis=-1).astype(x.dtype)


def lrpe_theta(heads, dim, base=10000.0):
    """Initial angles of `lrpe`: one geometric series over all heads' channels, float32 [heads, dim]."""
    i = np.arange(heads * dim).reshape(heads, dim)
    return (base ** (-2.0 * i / (heads * dim))).astype(np.float32)
