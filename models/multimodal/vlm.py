"""A LLaVA-like vision-language model: tower, projector, language model.

Visual and text rows are two groups with explicit positions; which rows exist is a matter of shapes (a reduction shortens
the arrays that later layers see), what order means is a matter of Meta.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxattn.core import mask as masks
from jaxattn.core.types import Array, Ctx, Meta, Tokens, contract, data, expect, settle, split
from jaxattn.nn import layers
from models import evidence as ev
from models import stack
from models.bind import Bound, Program, absolute, as_record, bind_stack, facts_of, left, needs_of, params_of, scheduled, subset
from models.language import llm
from models.multimodal import pictures
from models.vision import vit


@contract
class VLMConfig:
    """Static shape of a vision-language model.

    select: which layer's output the language model reads, as in Hugging Face (-1 last, -2 the one before).
    skip: the projector adds its input (same widths).  position: learned 2-D positions added after the projector, indexed by
      the original token.
    newline: a learned row ends each line of a picture read as tiles.  pinpoints: (height, width) that a picture may be fitted
      into, multiples of the tower's; () where a picture is one crop.  See ``models.multimodal.pictures``.
    """

    vision: vit.ViTConfig
    llm: llm.LLMConfig
    projector_hidden: int
    select: int = -2
    projector_norm: bool = False
    position: bool = False
    activation: str = "gelu"
    newline: bool = False
    pinpoints: tuple = ()

    def check(self):
        height, width = self.vision.image
        ok = not self.pinpoints or (height == width and not any(s % height or s < 1 for p in self.pinpoints for s in p))
        expect("pinpoints", self.pinpoints, f"(height, width) in multiples of a square tower's image, {self.vision.image}", ok)

    @property
    def visual(self) -> int:
        return self.vision.patches

    @property
    def run_layers(self) -> int:
        return self.vision.layers + 1 + self.select

    def site_spec(self, site: str):
        """The Spec of records bound between the stacks: "vision", rows as the tower leaves them; "project", rows as the
        language model reads them."""
        merged = self.vision.merge > 1  # then the rows behind the tower are as wide as the language model's
        stack_of = {"vision": self.llm if merged else self.vision, "project": self.llm}[site]
        return stack_of.block.spec(stack_of.layers, features=self.vision.block.dim)


class Projector(nnx.Module):
    """Two dense maps with an activation, of blocks of patches where the tower merges them; optionally a norm in front and
    learned positions behind."""

    def __init__(self, c: VLMConfig, *, rngs: nnx.Rngs):
        wide, dim = c.vision.block.dim, c.llm.block.dim
        if c.projector_norm:
            self.norm = layers.Norm(wide, kind=c.vision.block.norm)
        self.up = layers.Dense(wide * c.vision.merge**2, c.projector_hidden, bias=True, rngs=rngs)
        self.down = layers.Dense(c.projector_hidden, dim, bias=True, rngs=rngs)
        if c.position:
            self.pos = nnx.Param(jnp.asarray(vit.sincos_2d(*c.vision.grid, dim)) * 0.5)


class VLM(nnx.Module):
    """Parameters: vision, projector, llm and, with newlines, newline [C]."""

    def __init__(self, c: VLMConfig, *, rngs: nnx.Rngs):
        self.config = c
        self.vision = vit.ViT(c.vision, rngs=rngs)
        self.projector = Projector(c, rngs=rngs)
        self.llm = llm.LLM(c.llm, rngs=rngs)
        if c.newline:
            dim = c.llm.block.dim
            self.newline = nnx.Param(jax.random.normal(rngs.params(), (dim,)) * dim**-0.5)


@data
class Visual:
    """What the language model gets to see of an image: rows [B, K, C] with Meta, and the evidence found on the way;
    ``newlines``: rows [B, L, C] that end its lines, or None; ``aux``: what the transform of each site tells beside;
    ``origin``: Meta of the rows that ``slot`` follows, before any reduction."""

    x: Array
    meta: Meta
    slot: Array
    evidence: dict
    features: Array
    tower: stack.StackOut
    newlines: Tokens | None = None
    aux: dict = dataclasses.field(default_factory=dict)
    origin: Meta | None = None


def bind(c: VLMConfig, params, *, attention=None, reduce=None, cache=None, steering=None, vision_attention=None, remat=False,
         trained=None, key=None, newlines: str = "all") -> Bound:  # fmt: skip
    """Bind sockets. ``reduce`` maps sites to token methods: "vision.6" (inside the tower), "vision" (its output,
    or a method with a schedule of its own inside it),
    "project" (after the projector), "llm.8" (before layer 8), "llm" (a method with a schedule of its own). attention, cache
    and steering act in the language model, ``vision_attention`` in the tower.

    A budget inside the tower is of each crop; behind it, of all pictures of a prompt. newlines: which newline rows a
    model that has them reads: "all", whatever was dropped, "line": where a patch of their line is left in front of the
    language model, "none". Token methods never see them.
    """
    expect("newlines", repr(newlines), f"one of {pictures.NEWLINES}", newlines in pictures.NEWLINES)
    tower, between, language = {}, {}, {}
    for site, record in (reduce or {}).items():
        family, _, layer = site.partition(".")
        if family == "vision" and layer:
            expect("reduce", site, "a site behind the tower, whose patches are merged in blocks", c.vision.merge == 1)
            tower[layer] = record
        elif site in ("vision", "project"):
            record = as_record("tokens", record, c.vision.layers)
            staged = site == "vision" and hasattr(record, "schedule") and c.vision.merge == 1
            (tower if staged else between)["" if staged else site] = record
            if not staged and hasattr(record, "schedule"):
                raise ValueError(f"reduce[{site!r}]: {record} cuts a stack at several layers; bind it to 'llm'")
        elif family == "llm":
            language[layer] = record
        else:
            raise ValueError(f"reduce: expected vision, vision.<layer>, project, llm or llm.<layer>, got {site!r}")
    trained = trained or {}
    v_program, v_operands, v_fresh = bind_stack(c.vision.block, c.vision.layers, "vision", attention=vision_attention,
                                                reduce=tower, remat=remat, trained=trained.get("vision"), key=key,
                                                rows=c.visual)  # fmt: skip
    rows = c.visual  # what each transform leaves for the next one: a budget beyond it is an error here, with its name
    for _, record in scheduled(tower, c.vision.layers, "vision"):
        rows = left(record, rows)
    rows = None if c.pinpoints or not c.vision.positions else rows  # as many as a picture asks for
    for site in ("vision", "project"):
        rows = left(between[site], rows) if site in between else rows
    l_program, l_operands, l_fresh = bind_stack(c.llm.block, c.llm.layers, "llm", attention=attention, reduce=language,
                                                cache=cache, steering=steering, remat=remat, trained=trained.get("llm"),
                                                key=key, rows=rows)  # fmt: skip
    operands = {"vision": v_operands, "llm": l_operands, "sites": {}}
    fresh = {"vision": v_fresh, "llm": l_fresh, "sites": dict(trained.get("sites") or {})}
    sites, extra = [], []
    for site, record in between.items():
        spec = c.site_spec(site)
        program, operands["sites"][site] = split(record, spec)
        if hasattr(record, "init") and site not in fresh["sites"]:
            fresh["sites"][site] = record.init(jax.random.key(0) if key is None else key, spec)
        sites.append((site, program))
        extra.extend(needs_of(program))
    extra += [need for cut in l_program.cuts for need in needs_of(cut.transform)]
    v_program = _with_needs(v_program, extra)
    program = Program(c, (("vision", v_program), ("llm", l_program)), tuple(sites), newlines)
    return Bound(program, {"operands": operands, "trained": fresh}, params)


def _with_needs(program, extra):
    """The tower also answers what transforms behind it ask of its layers."""
    more = [dataclasses.replace(n, at=absolute(n.at, program.layers)) for n in extra if n.at.startswith("vision.")]
    return dataclasses.replace(program, needs=tuple(dict.fromkeys((*program.needs, *more))))


@jax.named_scope("vision")
def tower(bound: Bound, image: Array, *, dtype=None, phase: str = "prefill", whole: bool = False):
    """Run the tower to its select layer; with ``whole`` also the layers behind it (their output serves CLS heads)."""
    program, arrays, params = bound
    c: VLMConfig = program.config
    stack_program, mine = program.stack("vision"), subset(arrays, "vision")
    inside = getattr(image, "inside", None)
    image = pictures.crops_first(image) if isinstance(image, pictures.Pictures) else image
    if inside is None:
        streams = vit.embed(params["vision"], c.vision, image, dtype)
    else:
        streams = vit.embed_rows(params["vision"], c.vision, image, inside, dtype)
    facts = facts_of(program, arrays)
    out = stack.run(params["vision"], stack_program, mine, streams, phase=phase, stop=c.run_layers, evidence=facts)
    rest = None
    if whole and c.run_layers < c.vision.layers:
        rest = stack.run(params["vision"], stack_program, mine, out.streams, phase=phase, start=c.run_layers,
                         evidence=facts)  # fmt: skip
    return out, rest


@jax.named_scope("project")
def project(params: dict, c: VLMConfig, x: Array, original: Array) -> Array:
    """Feature rows [B, K, Cv] to language width; ``original`` int32 [B, K] says which patch each row was. Where the tower
    merges, each run of ``merge ** 2`` rows becomes one."""
    p = params["projector"]
    if c.projector_norm:
        x = layers.norm(p["norm"], x, 1e-6)
    x = x.reshape(x.shape[0], -1, x.shape[2] * c.vision.merge**2)
    y = layers.dense(p["down"], layers.ACTIVATIONS[c.activation](layers.dense(p["up"], x)))
    if c.position:
        y = y + jnp.take(p["pos"].astype(y.dtype), original, axis=0)
    return y


def see(bound: Bound, image: Array, *, prompt=None, dtype=None, phase: str = "prefill", key=None, out=None) -> Visual:
    """Image (or Pictures) to the visual rows of the language model: tower, reductions, projector.

    Args: prompt: Tokens-like (x [B, T, C], valid [B, T]) of the prompt's embeddings, for methods that read the text.
      out: a tower result computed before.
    Transforms also get the facts "image" (Pictures: the crops below each other), "special" (CLS and registers, of several
    crops the first's), "project", the projector as a function, and "places", its learned positions [N, C] or None. What they
    ask of the tower's layers is told of all crops of a prompt; of a tower that merges patches, of the blocks.
    """
    program, arrays, params = bound
    c: VLMConfig = program.config
    if hasattr(c, "see"):  # a model whose visual rows come about in another way
        return c.see(bound, image, prompt=prompt, dtype=dtype, phase=phase, key=key, out=out)
    needs = {need.name: need for need in program.stack("vision").needs}
    rest = None
    if out is None:  # layers behind the select layer run only where a method looks into them
        late = any(int(need.at.rsplit(".", 1)[1]) >= c.run_layers for need in needs.values() if not need.at.endswith("*"))
        out, rest = tower(bound, image, dtype=dtype, phase=phase, whole=late)
    streams = out.streams
    features, many = streams.tokens("vision"), isinstance(image, pictures.Pictures)
    start, stop = streams.span("vision")
    seen = {**out.evidence, **(rest.evidence if rest is not None else {})}
    found = {name: ev.columns(needs[name], x, start, stop) for name, x in seen.items() if name in needs}
    if program.stack("vision").cuts:  # facts about the tower's rows, told of its patches: they follow the slots from here
        spread = {name: ev.unfollow(x, features.slot) for name, x in found.items() if needs[name].what in ev.PER_KEY}
        found = {**found, **spread}
    special, whole = streams.tokens("special").x if c.vision.special else None, image
    merged = c.vision.merge**2
    if merged > 1:  # a block of patches is one token to every method behind the tower
        found = {name: pictures.merge_fact(needs[name].what, x, merged) for name, x in found.items()}
        x = project(params, c, features.x, None)
        features = Tokens(x, Meta.of(x.shape[1]).replace(valid=features.meta.valid[:, ::merged]))
    if many:
        expect("image", "Pictures", "one image per prompt for a projector with positions", not c.position)
        found = {name: pictures.fold_fact(image, needs[name].what, x) for name, x in found.items()}
        features = pictures.fold_tokens(image, features)
        streams = stack.streams_of({"vision": (features.x, features.meta)})
        streams = streams if features.slot is None else streams.replace(slots={"vision": features.slot})
        special = None if special is None else special[:: image.crops]
        whole = pictures.one_image(image, c.vision.grid, c.vision.patch) if c.vision.positions else None
    facts = {**seen, **found, "features": features.x, "text": prompt}
    towards = (lambda x, _: x) if merged > 1 else functools.partial(project, params, c)  # what is merged is projected already
    extra = {"image": whole, "special": special, "project": lambda x: towards(x, jnp.zeros(x.shape[:2], jnp.int32)),
             "places": params["projector"].get("pos")}  # fmt: skip
    ctx = Ctx(phase=phase, site="vision", key=key, spec=c.site_spec("vision"))
    record, aux = program.transform("vision"), {}
    site_arrays = {side: arrays.get(side, {}).get("sites", {}) for side in ("operands", "trained")}
    if record is not None:
        record = _of_crops(record, image)
        mine = params_of(site_arrays, "vision")
        streams, aux["vision"] = stack.transform(record, mine, streams, "vision", facts | extra, ctx)
    kept = streams.tokens("vision")
    record = program.transform("project")
    kept = pictures.in_order(kept, image.rows) if many and record is None else kept  # padding is not projected
    x = towards(kept.x, kept.meta.pos)
    groups = {"vision": (x, kept.meta)}
    visual = stack.streams_of(groups)
    visual = visual.replace(slots={"vision": kept.slot}, origins=streams.origins)
    if record is not None:
        record = _of_crops(record, image)
        ctx = Ctx(phase=phase, site="project", key=key, spec=c.site_spec("project"))
        mine = params_of(site_arrays, "project")
        visual, aux["project"] = stack.transform(record, mine, visual, "vision", facts | extra, ctx)
    rows, ends = visual.tokens("vision"), None
    rows = pictures.in_order(rows, image.rows) if many and record is not None else rows
    if many and c.newline and image.newlines is not None:
        ends = pictures.newline_rows(image, params["newline"].astype(rows.x.dtype), rows.meta, program.newlines)
    origin = image.patches if many else visual.origins.get("vision", rows.meta)
    origin = jax.tree.map(lambda a: jnp.broadcast_to(a, (rows.x.shape[0], *a.shape[1:])), origin)
    return Visual(rows.x, rows.meta, rows.slot, facts, features.x, out, ends, aux, origin)


def _of_crops(record, image):
    """A method that shares its budget among crops, for as many as there are, where it does not say."""
    if getattr(record, "crops", 1) is not None:
        return record
    crops = image.crops if isinstance(image, pictures.Pictures) else 1
    expect("keep", record.keep, f"at least one row for each of {crops} crops", record.keep >= crops)
    return settle(record, crops=crops)


def around_image(c: VLMConfig, meta: Meta, image_at=None) -> Meta:
    """Text rows numbered 0, 1, ... with room for the image behind the first ``image_at`` of them (None: in front)."""
    if image_at is None:
        return meta.replace(pos=meta.pos + c.visual)
    behind = meta.pos >= jnp.asarray(image_at, jnp.int32).reshape(-1, 1)
    return meta.replace(pos=meta.pos + c.visual * behind.astype(jnp.int32))


def question_meta(c: VLMConfig, batch: dict) -> tuple[Meta, object]:
    """(Meta, mask) of packed questions behind one image: every segment sees the image and itself, never another question;
    all questions take the same positions, right after the image's."""
    segment, position = jnp.asarray(batch["segment"]), jnp.asarray(batch["position"])
    order = c.visual + jnp.broadcast_to(jnp.arange(segment.shape[1], dtype=jnp.int32), segment.shape)
    labels = {"segment": segment}
    if "loss_mask" in batch:  # "answer": rows that feed the words of an answer back
        told = jnp.asarray(batch["loss_mask"]) > 0
        ahead = lambda x: jnp.pad(x[:, :-1], [(0, 0), (1, 0)])  # noqa: E731
        labels["answer"] = (told & ahead(told) & (ahead(segment) == segment)).astype(jnp.int32)
    meta = Meta(order, segment > 0, rope=c.visual + position, labels=labels)
    return meta, masks.causal() & (masks.same("segment") | masks.key_is("segment", 0))


def forward(bound: Bound, image: Array, tokens: Array, *, meta: Meta | None = None, mask=None, phase: str = "train", dtype=None,
            visual: Visual | None = None, key=None, new_rows: int = 0, image_at=None, logits: bool = True,
            **run) -> tuple[llm.LLMOut, Visual]:  # fmt: skip
    """Image [B, H, W, ch] (or Pictures) and text tokens int32 [B, T] around it to the text rows' logits [B, T, V].

    meta: default positions make room for the image, or are those of the Pictures.  visual: rows of ``see`` computed before.
    image_at: int or int32 [B], text rows that come before the image; None: all text follows it.
    """
    program, arrays, params = bound
    c: VLMConfig = program.config
    expect("tokens", f"shape {tokens.shape}", "[batch, tokens]", tokens.ndim == 2)
    many = isinstance(image, pictures.Pictures)
    expect("image_at", image_at, "None with Pictures, which know their places", image_at is None or not many)
    if meta is None:
        meta = llm.text_meta(tokens)
        meta = image.text_meta(meta) if many else around_image(c, meta, image_at)
    text = llm.embed(params["llm"], program.config.llm, tokens, dtype)
    if visual is None:
        visual = see(bound, image, prompt=(text, meta.valid), dtype=dtype, phase=phase, key=key)
    expect("image", f"{visual.x.shape[0]} of them", f"one for each of the {len(tokens)} prompts", len(visual.x) == len(tokens))
    seen, origin = visual.meta, visual.origin
    if image_at is not None:
        before = jnp.asarray(image_at, jnp.int32).reshape(-1, 1)
        shift = lambda m: m.replace(pos=m.pos + before, rope=None if m.rope is None else m.rope + before)  # noqa: E731
        seen, origin = shift(seen), None if origin is None else shift(origin)
    groups = {"vision": (visual.x, seen), "text": (text, meta)}
    if visual.newlines is not None:
        groups["newline"] = (visual.newlines.x, visual.newlines.meta)
    streams = stack.streams_of(groups)
    streams = streams.replace(slots={**streams.slots, "vision": visual.slot},
                              origins={} if origin is None else {"vision": origin})  # fmt: skip
    out = stack.run(params["llm"], program.stack("llm"), subset(arrays, "llm"), streams, phase=phase, mask=mask, key=key,
                    evidence=visual.evidence, new_rows=new_rows, **run)  # fmt: skip
    start, stop = out.streams.span("text")
    rows = stack.Streams(out.streams.x[:, start:stop], jax.tree.map(lambda a: a[:, start:stop], out.streams.meta),
                         {"text": out.streams.slots["text"]}, (("text", stop - start),))  # fmt: skip
    finished = llm.finish(bound, out.replace(streams=rows), logits=logits, params=params["llm"], c=c.llm)
    return finished.replace(stack=out), visual


def init(c: VLMConfig, seed: int = 0) -> dict:
    """Fresh parameters as a pure dict."""
    return jax.jit(lambda key: layers.pure(VLM(c, rngs=nnx.Rngs(params=key))))(jax.random.key(seed))
