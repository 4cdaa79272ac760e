"""Text families beyond one kind of layer: windows and rotary embeddings that differ by layer, round trips, padding in front,
methods on them, and what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import models
from jaxattn import cache
from models import hub
from models.hub import language, load
from models.language import llm
from tests.models.hub.test_agreement import GOLDEN, check_logits, forward, recorded
from tests.models.hub.test_files import equal

ROUND = ("gemma2_plain", "gemma3_text_linear", "qwen2_mixed", "phi3_longrope", "bert", "bert_masked", "clip_text_model",
         "clip_dual", "siglip_dual")  # fmt: skip


@pytest.mark.parametrize("case", ROUND)
def test_round_trip(case, tmp_path):
    """Every tensor comes back under its name, bit for bit; the model also without its config.json."""
    bound, config = hub.from_pretrained(GOLDEN / case)
    hub.save_pretrained(bound, tmp_path / "a", config)
    before, after = load_file(GOLDEN / case / "model.safetensors"), load_file(tmp_path / "a" / "model.safetensors")
    if case == "bert_masked":  # the head is kept; the body needs no prefix
        before = {k.removeprefix("bert."): v for k, v in before.items()}
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == config
    hub.save_pretrained(bound, tmp_path / "b")
    again, found = hub.from_pretrained(tmp_path / "b")
    assert found["model_type"] == config["model_type"]
    assert again.program == bound.program and equal(again.params, bound.params)


@pytest.mark.parametrize("case", ("gemma3_text", "llama_yarn"))
def test_padding_in_front(case):
    """Rows moved to the end of the batch's width: the same logits at their tokens."""
    found = recorded(case)
    bound, _ = hub.from_pretrained(GOLDEN / case)
    width = found["tokens"].shape[1]
    shift = lambda x: np.stack([np.roll(row, width - n, 0) for row, n in zip(x, found["lengths"], strict=True)])  # noqa: E731
    live = np.arange(width) >= width - found["lengths"][:, None]
    tokens = np.where(live, shift(found["tokens"]), 0)
    out = forward(llm, bound, tokens, meta=llm.text_meta(tokens).replace(valid=live))
    check_logits(np.asarray(out.logits) * live[..., None], shift(found["logits"]))


def test_methods_on_mixed_layers():
    """Policies and attentions see each layer's window and rotation: at full budget the recorded text."""
    found = recorded("gemma3_text")
    bound, _ = hub.from_pretrained(GOLDEN / "gemma3_text")
    tokens, lengths = found["tokens"][:2], found["lengths"][:2]
    run = lambda **sockets: np.asarray(models.generate(models.bind(bound, **sockets), tokens, steps=8, lengths=lengths))  # noqa: E731
    whole = found["greedy"][:2, :8]
    sockets = dict(cache="streamingllm:start=4,recent=64", steering="zerotuning:gamma=1.0")
    np.testing.assert_array_equal(run(**sockets), whole)  # keys are turned when they are read


def test_programs_of_mixed_layers_do_not_grow_with_depth():
    """The kind of a layer is data: one scan, whatever the depth."""

    def text(layers):
        full = tuple(range(5, layers, 6))
        c = llm.tiny(layers=layers, window=4, full_layers=full, local_rope=llm.Rope(8, 1e4), rope=llm.Rope(8, 1e6))
        params = jax.eval_shape(lambda: llm.init(c))
        run = lambda p: llm.forward(llm.bind(c, p), np.zeros((1, 8), np.int32)).logits  # noqa: E731
        return jax.make_jaxpr(run)(params)

    few, many = text(6), text(24)
    assert len(few.eqns) == len(many.eqns)
    scans = [e for e in many.eqns if e.primitive.name == "scan" and e.params["length"] == 24]
    assert len(scans) == 1


def test_longrope_turns_in_the_middle_of_a_text():
    """Frequencies change behind the trained length: transformers reads the text again, so do we; stopped rows stay stopped."""
    found = recorded("phi3_crossing")
    bound, _ = hub.from_pretrained(GOLDEN / "phi3_crossing", cache=cache.full())
    tokens, steps, stop = found["tokens"], found["greedy"].shape[1], int(found["greedy"][0, 40])
    ended = np.asarray(models.generate(bound, tokens, steps=steps, stop=stop, pad=60))
    assert ended.shape == found["greedy"].shape
    for row, theirs in zip(ended, found["greedy"], strict=True):
        at = np.flatnonzero(theirs == stop)[:1]
        until = int(at[0]) + 1 if len(at) else steps
        np.testing.assert_array_equal(row[:until], theirs[:until])
        assert (row[until:] == 60).all()


FIELDS = [
    ("gemma2", dict(use_bidirectional_attention=True), "use_bidirectional_attention = True is not supported"),
    ("gemma2", dict(attention_bias=True), "attention_bias = True is not supported"),
    ("gemma2", dict(layer_types=["full_attention"]), "layer_types: expected 2 of"),
    ("gemma2", dict(head_dim=10), r"of another shape .*k_proj.weight \[16, 24\], expected \[20, 24\]"),
    ("gemma2", dict(num_hidden_layers=3, layer_types=None), r"11 missing: model\.layers\.2\."),
    ("gemma3_text", dict(altup=3), "not supported: altup = 3"),
    ("gemma3_text", dict(rope_parameters=dict(global_attention={})), "rope_parameters: expected sliding_attention and"),
    ("gemma3_text", dict(rope_parameters=dict(full_attention=dict(rope_type="spiral"))), "rope_type = 'spiral'"),
    ("phi3_longrope", dict(rope_parameters=dict(rope_type="longrope", short_factor=[1.0], long_factor=[1.0])),
     "rope_parameters: short_factor: expected a number for each of 3 pairs"),
]  # fmt: skip


@pytest.mark.parametrize("case, fields, message", FIELDS)
def test_what_does_not_fit_is_refused(case, fields, message, tmp_path, monkeypatch):
    """Named, and before a single parameter exists."""
    monkeypatch.setattr(load, "_parameter", lambda *args: pytest.fail("allocated"))
    folder = tmp_path / case
    shutil.copytree(GOLDEN / case, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(ValueError, match=message):
        hub.from_pretrained(folder)


def test_features_that_no_family_has_are_not_written():
    odd = llm.tiny(vocab=16, layers=1, order="both", unit_offset=True, scale=0.5)
    for c in (odd, llm.tiny(vocab=16, layers=1, cap=3.0), llm.tiny(vocab=16, layers=1, logit_cap=3.0),
              llm.tiny(vocab=16, layers=2, window=3, full_layers=(1,))):  # fmt: skip
        with pytest.raises(ValueError, match="config: expected the features of one of"):
            language.family_of(c)
