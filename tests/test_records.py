"""Every registered factory: equal arguments give equal records, and what is an operand changes without compiling.

Programs are only traced here: a call whose program and shapes are known already reuses its executable, so a function
body that does not run again means no new compile. One test below counts real compilations.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import registry
from jaxattn.core.record import bucket
from jaxattn.core.types import OPERAND, Call, Const, Ctx, Meta, Spec, State, is_contract, split
from models import llm, sampling, vit, vlm
from models.bind import Bound
from tests.models.small import LLM, TOWER, VLM, images, prompts

generation = importlib.import_module("models.generate")
PLAIN_TOWER = vit.config(12, 3, 2, 16, 2, channels=2, hidden=32, cls=False)
DEEP = dataclasses.replace(VLM, vision=dataclasses.replace(TOWER, layers=6))  # methods name layers of the tower
GATES = np.tile([0.9, 0.1], (LLM.layers, 1))

# Arguments of factories that need some, beside `keep`, or whose defaults are too large for the small models.
EXAMPLES = {
    ("attention", "agent_attention"): {"agents": 4, "grid": (4, 4)},
    ("attention", "agent_sd"): {"grid": (4, 4)},
    ("attention", "dynamic_mask_attention"): {"width": 4},
    ("attention", "duoattention_streams"): {"sink": 2, "recent": 4},
    ("attention", "flexprefill"): {"block": 4, "min_budget": 4},
    ("attention", "landmark_attention"): {"every": 3},
    ("cache", "duoattention"): {"gates": GATES, "sink": 1, "recent": 4},
    ("cache", "h2o"): {"budget": 4, "recent": 4},
    ("cache", "h2o_mask"): {"budget": 4, "recent": 4},
    ("cache", "streamingllm"): {"recent": 8},
    ("cache", "tidaldecode"): {"budget": 4, "select": (1, 3)},
    ("steering", "var"): {"dims": (0, 3)},
    ("steering", "vhr"): {"layers": (1, 2)},
    ("steering", "zerotuning"): {"gamma": 1.5, "heads": (0, 1)},
    ("tokens", "adatoken_3d"): {"rates": np.linspace(1, 0.4, LLM.layers)},
    ("tokens", "attention_debiasing"): {"host": lambda: registry.get("tokens", "fastervlm")(8)},
    ("tokens", "mustdrop_merge"): {"size": 2},
    ("tokens", "quota"): {"total": 12, "scores": (0.7,), "grid": (4, 4)},
    ("tokens", "tokenflex"): {"sizes": (4, 9)},
    ("tokens", "visiondrop_stages"): {"keep": ((6, 2), (4, 2), (2, 1))},
    ("tokens", "visiondrop"): {"dominant": 6, "contextual": 2},
    ("tokens", "vmtc"): {"keep": 6, "clusters": 4},
    ("objective", "meap"): {"mask_id": 3},
    ("analysis", "attention_sink_emergence"): {"layers": LLM.layers},
    ("analysis", "text_dominance"): {"layers": LLM.layers},
}
PROCEDURES = {"conversion"}  # sockets whose entries run and return artifacts: no records
WITHOUT_MODEL = {"objective"}  # their place is the training loop; no operands to rebind
IN_TOWER = {"agent_attention", "agent_sd"}  # no causal mask
ALONE = {"duoattention_streams", "landmark_attention"}  # need a doubled batch, or landmarks in the text

ALL = [(socket, name) for socket in registry.SOCKETS for name in registry.names(socket) if socket not in PROCEDURES]


def build(socket: str, name: str):
    """The record of the example, or of `keep` alone."""
    factory = registry.get(socket, name)
    given = {k: v() if callable(v) else v for k, v in EXAMPLES.get((socket, name), {}).items()}
    parameters = inspect.signature(factory).parameters.values()
    missing = {p.name for p in parameters if p.default is p.empty and p.kind != p.VAR_KEYWORD} - set(given)
    if missing - {"keep"}:
        pytest.fail(f"{socket} {name}: add arguments for {sorted(missing)} to EXAMPLES in {__file__}")
    return factory(**given, **({"keep": 8} if "keep" in missing else {}))


@pytest.mark.parametrize(("socket", "name"), ALL, ids=lambda x: x)
def test_equal_arguments_give_equal_records(socket, name):
    one, two = build(socket, name), build(socket, name)
    assert is_contract(one), f"{name} returns {type(one).__name__}, not a record"
    assert one == two and hash(one) == hash(two)
    spec = Spec(layers=6, dim=16, heads=4, kv_heads=2, head_dim=4, length=16)
    (p, a), (q, b) = split(one, spec), split(two, spec)
    assert p == q and hash(p) == hash(q)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ------------------------------------------------------------------------------------------ rebuilding and operands


def other_values(record):
    """(field, record with another value of it) for every operand that has a value; budgets stay in their bucket."""
    for f in dataclasses.fields(record):
        kind, value = f.metadata.get("operand"), getattr(record, f.name)
        if is_contract(value):
            for name, inner in other_values(value):
                yield f"{f.name}.{name}", dataclasses.replace(record, **{f.name: inner})
        if kind is None or (value is None and kind not in ("layers", "heads")):
            continue
        if kind == "budget":
            new = next((n for n in (value - 1, value + 1) if n > 0 and bucket(n) == bucket(value)), value)
        elif kind in ("scalar", "int"):
            new = value + 1 if kind == "int" else value * 0.75 if value else 0.25
        elif kind == "layers":
            new = (0, -1)
        elif kind == "heads":
            new = (1,) if not isinstance(value, float) else value + 0.5
        else:
            new = value.numpy() if isinstance(value, Const) else np.asarray(value)
            new = new[..., ::-1]
        yield f.name, dataclasses.replace(record, **{f.name: new})


class Counted:
    """A jitted function of (program, arrays, ...) that knows how often it was traced."""

    def __init__(self, f):
        self.runs = 0

        @functools.partial(jax.jit, static_argnums=0)
        def counted(program, *rest):
            self.runs += 1
            return f(program, *rest)

        self.jitted = counted

    def __call__(self, program, *rest):
        self.jitted.trace(program, *rest)


def read(program, arrays, params, tokens):
    return llm.forward(Bound(program, arrays, params), tokens).logits


def see(program, arrays, params, image):
    return vit.forward(Bound(program, arrays, params), image).streams.x


def look(program, arrays, params, image, tokens):
    bound = Bound(program, arrays, params)
    return vlm.forward(bound, image, tokens, key=jax.random.key(0))[0].logits  # some draw in training


def say(program, arrays, params, image, tokens):
    bound = Bound(program, arrays, params)
    state = generation.prefill(bound, tokens, image=image, max_new=3)[1]
    return generation.decode(bound, state)


@functools.cache
def shapes(family, config):
    return jax.eval_shape(lambda: family.init(config))


def site_of(record) -> str:
    """Where a token method acts: what it asks for says so."""
    if hasattr(record, "place"):
        return record.place
    if hasattr(record, "schedule"):
        return "llm"
    record = record.resolve(DEEP.vision.layers) if hasattr(record, "resolve") else record
    wants = record.needs() if hasattr(record, "needs") else ()
    wants = {need.at for need in wants if need.what not in ("text", "features")}
    return "llm.3" if wants & {"next", "last"} or any(at.startswith("llm") for at in wants) else "vision"


def user(socket: str, name: str):
    """(function, bind(record) -> Bound, arguments behind the parameters) of a small model that uses the record."""
    tokens, image = jnp.asarray(prompts()), jnp.asarray(images())
    if name in IN_TOWER:
        c = PLAIN_TOWER
        return see, lambda r: vit.bind(c, shapes(vit, c), attention=r), (image,)
    if socket == "attention":
        return read, lambda r: llm.bind(LLM, shapes(llm, LLM), attention=r), (tokens,)
    if socket == "analysis":
        return read, lambda r: llm.bind(LLM, shapes(llm, LLM), steering=r), (tokens,)
    from jaxattn import cache

    params, full = shapes(vlm, DEEP), cache.full()
    if socket == "tokens":
        return look, lambda r: vlm.bind(DEEP, params, reduce={site_of(r): r}), (image, tokens)
    if socket == "cache":
        return say, lambda r: vlm.bind(DEEP, params, cache=r), (image, tokens)
    assert socket == "steering", f"say how a {socket} is bound"
    return say, lambda r: vlm.bind(DEEP, params, cache=full, steering=r), (image, tokens)


@pytest.mark.parametrize(
    ("socket", "name"), [x for x in ALL if x[0] not in WITHOUT_MODEL and x[1] not in ALONE], ids=lambda x: x
)
def test_rebuilding_and_operands_compile_nothing(socket, name):
    f, bind, args = user(socket, name)
    call = Counted(f)

    def use(record):
        bound = bind(record)
        call(bound.program, bound.arrays, bound.params, *args)

    record = build(socket, name)
    use(record)
    assert call.runs == 1
    use(build(socket, name))
    assert call.runs == 1, "equal arguments, another program"
    for field, changed in other_values(record):
        use(changed)
        assert call.runs == 1, f"{field} is an operand: {getattr(changed, field, changed)} must not compile"


@pytest.mark.parametrize("name", sorted(ALONE))
def test_attentions_that_need_their_own_batch(name):
    """As above, on a Call of their own."""
    record = build("attention", name)
    spec = Spec(layers=2, dim=16, heads=4, kv_heads=2, head_dim=4, value_dim=4)
    q, k = (jnp.ones((2, 8, h, 4)) for h in (4, 2))
    landmark = jnp.tile(jnp.arange(8) % 4 == 3, (2, 1)).astype(jnp.int32)
    meta = Meta.of(8, pos=jnp.tile(jnp.arange(8), (2, 1)), landmark=landmark, response=landmark)

    def one(program, params):
        from jaxattn.core.mask import causal

        call = Call(q, k, k, meta, meta, mask=causal())
        return program.apply(params, State(), call, Ctx(layer=0, spec=spec, x=jnp.ones((2, 8, 16))))[0].out

    call = Counted(one)
    for r in (record, build("attention", name), *(changed for _, changed in other_values(record))):
        program, params = split(r, spec)
        fresh = r.init(jax.random.key(0), spec) if hasattr(r, "init") else {}
        call(program, {**params, **fresh})
    assert call.runs == 1


def test_a_static_field_does_compile():
    """The counter counts: what is no operand gives another program."""
    f, bind, args = user("cache", "streamingllm")
    call = Counted(f)
    for start in (2, 2, 3):
        bound = bind(registry.get("cache", "streamingllm")(start=start, recent=8))
        call(bound.program, bound.arrays, bound.params, *args)
    assert call.runs == 2


def test_programs_hold_no_operands():
    for socket, name in ALL:
        record = build(socket, name)
        program, params = split(record, Spec(layers=6, heads=4, kv_heads=2, head_dim=4, length=16))
        for f in dataclasses.fields(record):
            kind = f.metadata.get("operand")
            if kind and f.name in params:
                value = getattr(program, f.name)
                assert value == OPERAND or kind == "budget" and value == bucket(getattr(record, f.name)), (name, f.name)
                leaf = params[f.name]
                assert isinstance(leaf, (np.ndarray, np.generic)), f"{name}.{f.name}: {type(leaf).__name__}"


def test_nothing_at_all_is_compiled_the_second_time():
    """Whole generations with methods in several sockets, rebuilt and with other operands, counting compilations."""
    from jaxattn import cache, steering, tokens

    events = collections.Counter()
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.update([event]))
    params = vlm.init(VLM)

    def run(keep, budget, gamma, layers, temperature, seed):
        bound = vlm.bind(VLM, params, cache=cache.h2o(budget, 4), reduce={"vision": tokens.uniform(keep)},
                         steering=steering.zerotuning(gamma, layers=layers))  # fmt: skip
        new = generation.generate(bound, prompts(), image=images(), steps=3, sampler=sampling.sample(temperature),
                                  key=jax.random.key(seed))  # fmt: skip
        return jax.block_until_ready(new)

    compiled = "/jax/core/compile/backend_compile_duration"
    run(8, 4, 1.5, None, 1.0, 0)
    first = events[compiled]
    assert first > 0, f"no event of compilation among {sorted(events)}"
    run(8, 4, 1.5, None, 1.0, 0)
    run(7, 3, 0.5, (0, -1), 0.5, 1)
    assert events[compiled] == first
    assert TOWER.layers != LLM.layers  # layer sets of two stacks are told apart
