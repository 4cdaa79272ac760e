"""The card of contracts: every record that crosses a boundary in this library.

Two kinds of record live here.

* ``@data`` records are pytrees: they carry arrays (and a few static fields) through jit, grad, vmap and shard_map.
* ``@contract`` records are frozen dataclasses compared and hashed by value. A method of the field is a lower-case
  factory that returns one. Behaviour is methods; what varies without recompilation is an *operand*: a field declared
  with :func:`operand`. :func:`split` separates a record into its static *program* and the arrays (*params*) of its
  operands, so that changing a gain, a threshold, a layer set or a budget inside its bucket compiles nothing.

Letters: B batch, N new rows (queries), M key rows, H query heads, G kv heads (H % G == 0), D head size, Dv value size,
L layers, K key units; ``B|1`` means "or broadcast".
"""

from __future__ import annotations

from dataclasses import field
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from jaxattn.core.record import (
    OPERAND,
    Const,
    Spec,
    bucket,
    contract,
    data,
    expect,
    init_params,
    is_contract,
    operand,
    settle,
    split,
    static,
)  # fmt: skip

Array = jax.Array


# ----------------------------------------------------------------------------------------------------------- data
@data
class Meta:
    """What is known about each token. Everything positional reads it, so pruned, packed, permuted and cached rows need
    no special case.

    Attributes:
      pos: int32 [B|1, N]; order in time, the only field causality, windows and age read.
      valid: bool [B|1, N]; padding is False.
      rope: [B|1, N] or [B|1, N, A] or None; what the rotary embedding reads (None: ``pos``).
      size: float32 [B|1, N] or None; input tokens a row stands for: ``attend`` adds log(size) to its logits.
      labels: {name: int32 [B|1, N]}; kind, role, segment, turn, frame, row, col, ...
      weight: float [B|1, N] or None; how much a key counts for every row but its own, for which it counts wholly:
        ``attend`` multiplies its exp(logit). 0 hides a key from the others with a gradient that says what showing it would do.
    All fields may carry a kv-head axis, [B, G, N], where kv heads keep different rows (caches).
    """

    pos: Array
    valid: Array
    rope: Array | None = None
    size: Array | None = None
    labels: dict[str, Array] = field(default_factory=dict)
    weight: Array | None = None

    @staticmethod
    def of(n: int, *, pos=None, valid=None, rope=None, size=None, **labels) -> Meta:
        """Meta of ``n`` consecutive tokens (numpy, hence known at trace time, unless arrays are given)."""
        pos = np.arange(n, dtype=np.int32)[None] if pos is None else pos
        valid = np.ones(pos.shape, bool) if valid is None else valid
        return Meta(pos, valid, rope, size, labels)

    @property
    def n(self) -> int:
        return self.pos.shape[-1]


@data
class Selection:
    """Which key units each tile of queries reads.

    Attributes:
      index: int32 [B|1, Hs, Nq, K], Hs in {1, G, H}; valid entries first, ascending, no duplicates.
      count: int32 [B|1, Hs, Nq]; entries in use; loops stop there.
      unit: static; keys per unit.  tile: static; queries per tile; Nq = ceil(N / tile).
      bounds: int32 [B|1, Hs, Nq, K, 2] or None; live range [start, stop) inside each unit.
      pos: int32 [B|1, Hs, Nq, K] or None; rotary position given to the first key of a retrieved unit.
      log_weight: float32 [B|1, Hs, Nq, K] or None; added to the logits of a unit.
      distinct: static; the maker knows that no list holds a unit twice. Else attention looks, and counts it once (with its
        first range and weight).
    A selection never encodes exact causality: the mask is applied on top.
    """

    index: Array
    count: Array
    unit: int = static(1)
    tile: int = static(1)
    bounds: Array | None = None
    pos: Array | None = None
    log_weight: Array | None = None
    distinct: bool = static(False)


@data
class Part:
    """A partial attention: ``out`` [B, N, H, Dv] normalised by its own mass, ``lse`` float32 [B, N, H] the log of that
    mass (-inf for rows that see nothing, whose ``out`` is 0). ``lse=None``: not normalised; such Parts add."""

    out: Array
    lse: Array | None = None


@data
class View:
    """What a cache shows to attention, already in the layer's dtype.

    Attributes:
      k, v: [B, M, G', D], [B, M, G', Dv].   meta: of the M rows, fields [B|1, M] or [B, G', M].
      key: {name: [B|1, M, G'|H'|1]}; per-key side rows (see Call.key).
      where: a Selection over the M rows, or None.
      own: bool [B|1, N|1, H] or None; False hides the new rows themselves from that query row and head.
      heads: int32 [G'] or None; the kv heads this view covers (None: all of them).
    """

    k: Array
    v: Array
    meta: Meta
    key: dict[str, Array] = field(default_factory=dict)
    where: Selection | None = None
    own: Array | None = None
    heads: Array | None = None


@data
class Call:
    """The arguments of one attention.

    Attributes:
      q: [B, N, H, D];  k: [B, M, G, D];  v: [B, M, G, Dv]; rotary already applied.
      q_meta, k_meta: Meta of the N and M rows.
      past: Views of cached keys, attended besides k, v (each query row softmaxes over the union).
      where: Selection over the M own keys.  bias: float [B|1, H|1, N|1, M], added to the own keys' logits.
      row: {name: [B|1, N|1, H|1]}, key: {name: [B|1, M, H|G|1]}: operands of score_mod. ``key["bias"]`` is added to
        the logits; ``key["group"]`` int32 is the class of each key for ``gain``.
      sink_logit: [H] or [B|1, N|1, H]; mass exp(sink_logit) joins the normaliser and carries no value.
      out_gate: [B, N, H, 1|Dv]; multiplies the output.
      gain: a contract ``gain(masses [B, N, H, C], args) -> gains [B, N, H, C] >= 0`` with ``groups = C``: the output
        becomes sum_c gains_c * (part of the output that came from class c). gain_args: its arrays.
      mask: a ``masks`` expression.  score_mod: a contract ``(logits, q: Meta, k: Meta, row, key) -> logits``.
      normalizer: "softmax" | "l1" (divide by the sum of scores) | "none".  scale: None means D ** -0.5.
      rope: the layer's Rope, for Selections that give their own positions.
    """

    q: Array
    k: Array
    v: Array
    q_meta: Meta
    k_meta: Meta
    past: tuple[View, ...] = ()
    where: Selection | None = None
    bias: Array | None = None
    row: dict[str, Array] = field(default_factory=dict)
    key: dict[str, Array] = field(default_factory=dict)
    sink_logit: Array | None = None
    out_gate: Array | None = None
    gain_args: dict[str, Array] = field(default_factory=dict)
    mask: Any = static(None)
    score_mod: Any = static(None)
    normalizer: str = static("softmax")
    scale: float | None = static(None)
    gain: Any = static(None)
    rope: Any = static(None)

    def map_keys(self, fn) -> Call:
        """Apply ``fn(meta, key) -> key`` to the side rows of the own keys and of every past view alike."""
        past = tuple(view.replace(key=fn(view.meta, view.key)) for view in self.past)
        return self.replace(key=fn(self.k_meta, self.key), past=past)


@data
class Tokens:
    """Rows of a residual stream: x [B, N, C], meta, slot int32 [B, N0] (row that now carries original row i; -1: none)."""

    x: Array
    meta: Meta
    slot: Array | None = None


@data
class State:
    """State of a socket. ``layer``: pytree, leaves stacked [L, ...] outside the layer loop, one layer's slice inside.
    ``shared``: threaded from layer to layer and from step to step."""

    layer: Any = ()
    shared: Any = ()


@data
class Ctx:
    """Where a call happens.

    Attributes:
      layer: int32 scalar (traced inside the scan).  step: int32 scalar; tokens generated so far.
      key: PRNG key or None.  x: the block's normalised input [B, N, C].  hidden: the residual stream [B, N, C].
      const: read-only memory (e.g. visual rows for cross attention).
      phase: "train" | "prefill" (nothing cached before) | "extend" (several rows after a cache) |
        "decode" (one row).  site: "vision" | "llm" | "llm.8" ...  spec: the stack's Spec.
      groups: ((name, first row, row behind the last), ...) of the stack's rows.
    """

    layer: Any = 0
    step: Any = 0
    key: Any = None
    x: Any = None
    hidden: Any = None
    const: Any = ()
    phase: str = static("train")
    site: str = static("")
    spec: Any = static(None)
    groups: tuple = static(())


# ------------------------------------------------------------------------------------------------------ contracts
@contract
class Need:
    """A request for evidence from inside a forward pass. The answer is one array under ``name``.

    what: "received" (rows' weighted sum of probabilities, per key), "hidden" (residual stream; "hidden_mean" [B, C], its
      mean over rows), "keys" (k before the
      rotary embedding), "rotated_keys", "values" ([B, N, G, D]), "rows" (probabilities of a few rows), "entropy",
      "value_received" ("received" with the values in place of queries and keys; "raw_value_received": not scaled by
      D ** -0.5), "transition" ([B, N], how far both
      sub-blocks of the layer move a row: ``statistics.transition``), "between" ([B, groups, groups], where the
      attention of each group of rows goes, in the stack's order), "head_out", "text" (prompt embeddings), "features"
      (the vision tower's output).
    at: "vision.-2" (inside layer -2 of the vision tower), "llm.7", "llm.*" (every layer, stacked first), or "next": the
      layer that would run next, projected on the rows at the cut.
    rows: whose queries: "all", "last", "cls", "text", "vision", an int w (the last w rows), or a contract
      ``(meta, evidence) -> weights [B, N]``, which may name a Need of the same layer as ``given``: it is answered first;
      and the ``group`` of rows that have all the weight: no other row is asked.
      Weights of named rows average over them; ``total=True`` sums instead.
    over_heads: "mean" | "sum" | "max" | None (keep [B, H, M]).
    temperature: divides the logits. iterate: applications of w <- w P (PageRank).
    merged: "sum" | "max"; what a row merged since has of its members' answers.
    through: gradients pass; they stop at evidence otherwise.
    """

    name: str
    what: str = "received"
    at: str = "next"
    rows: Any = "all"
    over_heads: str | None = "mean"
    total: bool = False
    temperature: float = 1.0
    iterate: int = 1
    merged: str = "sum"
    through: bool = False


# The seven sockets. Protocols document what the model's loop calls; records need not inherit from them, and optional
# members (marked) may simply be absent.
@runtime_checkable
class Attention(Protocol):
    """What a layer's attention computes. Optional: ``init(key, spec) -> dict`` trainable arrays of one layer;
    ``init_state(spec) -> State`` with ``recurrent = True`` when it owns its state instead of a cache;
    ``side(params, x, k, v) -> {name: [B, N, G|1]}`` per-key rows that must be cached with k and v."""

    def apply(self, params: dict, state: State, call: Call, ctx: Ctx) -> tuple[Part, State, dict]: ...


@runtime_checkable
class Mixer(Protocol):
    """Any sub-layer x -> y with parameters. ``init(key, spec) -> dict``; optional ``init_state(spec) -> State``."""

    def apply(self, params: dict, state: State, x: Array, meta: Meta, ctx: Ctx) -> tuple[Array, State, dict]: ...


@runtime_checkable
class TokenTransform(Protocol):
    """Tokens and evidence in, fewer (or other) tokens out. ``rows(n)`` is the static number of rows that leave.
    Optional: ``needs() -> tuple[Need, ...]``; ``acts_on`` = "vision" | "text" | "all" (default "vision");
    ``inside = True``: a cut at layer l acts inside it, between attention and feed-forward, and "last" is that layer;
    ``sites(layers) -> tuple[int, ...]`` for one that cuts a stack at several depths; ``init``, ``init_state``;
    ``place``, the site it is made for where its needs do not say;
    ``facts(params) -> {name: array}``, operands that the row weights of its Needs read as evidence;
    ``carries``, a name: the State that one cut of that name returns is what the next one of the stack gets (the first:
    an empty one). Values of rows in it are the record's to gather with the rows (``reduce.follow_rows``)."""

    def rows(self, n: int) -> int: ...

    def apply(self, params: dict, state: State, tokens: Tokens, evidence: dict, ctx: Ctx) -> tuple[Tokens, State, dict]: ...


@runtime_checkable
class CachePolicy(Protocol):
    """Which keys exist. Inside the layer loop the cache is read-only; ``pending`` says what a step leaves behind and
    ``commit`` writes it for all layers at once.

    ``rotated``: whether stored keys carry their rotary embedding (False: rotated on read at ``view.meta.rope``).
    ``view`` gets the new rows' q and k (as they will be stored) and their Meta, and returns Views and ``State.shared``.
    ``positions(params, state, meta, ctx) -> Meta`` (optional) sets the rotary positions of the new rows.
    ``needs()`` (optional): evidence handed to ``pending`` as {"own": [B, H, N], "past": ([B, H, M], ...)} per name.
    """

    def init_state(self, spec: Spec) -> State: ...

    def view(self, params: dict, state: State, q: Array, k: Array, meta: Meta, ctx: Ctx) -> tuple[tuple[View, ...], Any]: ...

    def pending(self, params, state, k, v, meta, side, evidence, ctx) -> Any: ...

    def commit(self, params: dict, state: State, pending: Any) -> State: ...


@runtime_checkable
class Steering(Protocol):
    """Edits of what a trained layer computes; every member is optional and absent where untouched:
    ``side(params, state, meta, ctx) -> {name: rows}`` per-key facts frozen beside the cache (found at prefill);
    ``call(params, state, call, ctx) -> Call``; ``heads(params, state, out [B, N, H, Dv], meta, ctx) -> (out, State)``;
    ``hidden(params, state, x, ctx) -> x`` on the block's output;
    ``paired = True``: the batch is doubled, its second half without image rows; ``init_state(spec)``;
    ``blank(batch, rows, groups) -> pytree``: what layers hand to each other as ``State.shared`` within one pass, as a run of
    layers with these rows begins (``groups`` as in Ctx; a cut begins another run);
    ``observe(params, state, call, part, ctx) -> State``: looks at an attention that has run, its probabilities being those
    of ``call`` with the mass ``part.lse``;
    ``neurons(group, hidden) -> int``: how many of the ``hidden`` neurons of the feed-forward, from the first, the rows of a
    group use;
    ``unmerge = True``: queries, keys and values of a prompt stand at the places of all the tokens that merged rows carry,
    caches keep them so, and the head outputs of a row's places are averaged."""


@runtime_checkable
class Sampler(Protocol):
    """From logits [B, V] to what is emitted. ``step`` may return edited logits as ``emitted`` when chained."""

    def step(self, params: dict, state: State, value: Array, hidden: Array, ctx: Ctx) -> tuple[Array, State, Array]: ...


@runtime_checkable
class Objective(Protocol):
    """What is minimised, with its own state (teachers, references). ``loss(params, state, forward, batch, key)``
    where ``forward(batch) -> outputs``; returns (loss, metrics).

    Optional, for those that train a method inside a model (``train.methods``, where outputs are an Outcome):
    ``teacher = True``: ``state.shared`` is the Outcome of the model without the method, through which nothing is trained;
    ``needs() -> tuple[Need, ...]``: what both show; ``init(key, outcome, teacher) -> dict``: parts that only training has,
    for outcomes of these shapes; ``rates``: {"model" | "method" | "objective": factor on the learning rate, 0 freezes}."""

    def loss(self, params: dict, state: State, forward: Any, batch: dict, key: Any) -> tuple[Array, dict]: ...


@runtime_checkable
class Trained(Protocol):
    """A trained model that reads images, as conversions run it (functions ``(model, batches, key, ...) -> (model, artifact)``
    registered for "conversion"; the artifact is a dict of numpy arrays).

    ``layers``: {"vision": layers that are read, "llm": layers}; ``visual``: image rows that enter the language model.
    ``run(batch, *, needs=(), **sockets)``: one pass of the model bound to these sockets (reduce, steering, ...), as an object
    with ``hidden`` [R, C], the rows behind the last norm that predict answers; ``right`` bool [R]; ``evidence`` {name: array}
    of the needs inside the language model; ``told`` {"vision" | "sites" | "llm": {cut or site: what its transform tells}}."""

    layers: dict[str, int]
    visual: int

    def run(self, batch: dict, *, needs: tuple = (), **sockets) -> Any: ...


def default_state(record, spec: Spec) -> State:
    return record.init_state(spec) if hasattr(record, "init_state") else State()


__all__ = [
    "OPERAND", "Array", "Attention", "CachePolicy", "Call", "Const", "Ctx", "Meta", "Mixer", "Need", "Objective", "Part",
    "Sampler", "Selection", "Spec", "State", "Steering", "TokenTransform", "Tokens", "Trained", "View", "bucket", "contract",
    "data", "default_state", "expect", "init_params", "is_contract", "operand", "settle", "split", "static",
]  # fmt: skip
