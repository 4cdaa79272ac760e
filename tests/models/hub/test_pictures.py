"""Pictures as tiles and several pictures in a prompt: what transformers computes, and token methods on such rows."""

import functools
import importlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from jaxattn import cache, tokens
from jaxattn.core.labels import KIND_NEWLINE, KIND_VISION
from models import hub
from models.hub import images
from models.multimodal import pictures, vlm
from tests.models.hub.test_agreement import check_greedy, check_logits, recorded

generation = importlib.import_module("models.generate")
GOLDEN = Path(__file__).parents[2] / "golden" / "hf"
MANY = ("llava_next", "llava_next_siglip", "qwen2_5_vl", "qwen2_5_vl_tied")


def prepared(case, found):
    """Per prompt the (crops, size) of its pictures, through the checkpoint's processor."""
    pytest.importorskip("PIL")
    fields, rows = images.read_processor(GOLDEN / case), []
    for i in range(len(found["tokens"])):
        names = sorted(n for n in found if n.startswith(f"picture.{i}."))
        rows.append([images.crops(found[n], fields) for n in names])
        for n, (crops, size) in zip(names, rows[-1], strict=True):
            assert size == found[n].shape[:2] or case.startswith("qwen")
            np.testing.assert_allclose(crops, found[n.replace("picture", "pixels")][: len(crops)], atol=1e-5)
    return rows


@functools.partial(jax.jit, static_argnums=0)
def _forward(program, arrays, params, pixels, words):
    return vlm.forward(models.Bound(program, arrays, params), pixels, words)


@functools.partial(jax.jit, static_argnums=0)
def _say(program, arrays, params, pixels, words, lengths):
    """Logits [2, B, V] behind the prompt and behind one more token."""
    bound = models.Bound(program, arrays, params)
    first, state = generation.prefill(bound, words, image=pixels, lengths=lengths, max_new=2)
    return jnp.stack([first, generation.decode(bound, state)[0]])


@pytest.mark.parametrize("case", MANY)
def test_pictures_of_many_shapes(case):
    """Processor, logits behind every picture and, of two, 64 greedy tokens: pictures of several shapes, padded rows."""
    found = recorded(case)
    bound, config = hub.from_pretrained(GOLDEN / case, cache=cache.full())
    c, mark = bound.program.config, config.get("image_token_index", config.get("image_token_id"))
    rows = prepared(case, found)
    words, lengths, many = hub.place_pictures(c, found["tokens"], mark, rows, found["lengths"])
    out, visual = _forward(*bound, many, words)
    for i, n in enumerate(lengths):
        check_logits(out.logits[i, :n], found[f"logits.{i}"])
    if case in ("llava_next", "qwen2_5_vl"):
        new = models.generate(bound, words, steps=found["greedy"].shape[1], lengths=lengths, image=many)
        check_greedy(new, found)

    short = [[t for i, t in enumerate(row[:n]) if t != mark or row[i - 1] != mark] for row, n in
             zip(found["tokens"].tolist(), found["lengths"], strict=True)]  # fmt: skip
    each = [len(row) for row in short]
    padded = np.array([row + [0] * (max(each) - len(row)) for row in short])
    again = hub.place_pictures(c, padded, mark, rows, each)
    jax.tree.map(np.testing.assert_array_equal, (words, lengths, many), again)


def test_two_pictures_in_a_llava_prompt():
    found = recorded("llava")
    bound, config = hub.from_pretrained(GOLDEN / "llava", cache=cache.full())
    c, mark, size = bound.program.config, config["image_token_index"], (12, 12)
    rows = [[(x[None], size) for x in found["image"]]]
    words, _, many = hub.place_pictures(c, found["pair"], mark, rows)
    check_logits(_forward(*bound, many, words)[0].logits[0], found["pair_logits"])

    rows = [[(x[None], size)] for x in found["image"]]  # one each: as an image array
    words, lengths, many = hub.place_pictures(c, found["tokens"], mark, rows, found["lengths"])
    plain, _, image_at = hub.place_image(found["tokens"], mark, found["lengths"])
    np.testing.assert_array_equal(words, plain)
    with pytest.raises(ValueError, match=r"tokens\[1\]: expected 2, one for each picture, or 18, .* got 9 image tokens"):
        hub.place_pictures(c, found["tokens"], mark, [rows[0], rows[0] * 2], found["lengths"])
    with pytest.raises(ValueError, match="text behind the last picture"):
        hub.place_pictures(c, [[3, mark]], mark, rows[:1])
    with pytest.raises(ValueError, match="images: expected one for each of the 2 prompts, got 1 lists"):
        hub.place_pictures(c, found["tokens"], mark, rows[:1], found["lengths"])
    with pytest.raises(ValueError, match="image_at: expected None with Pictures"):
        vlm.forward(bound, many, words, image_at=2)
    with pytest.raises(ValueError, match="image: expected an image per prompt"):
        models.generate(bound, words, steps=2)
    with pytest.raises(ValueError, match="image: expected one for each of the 2 prompts, got 1"):
        vlm.forward(bound, found["image"][:1], words)


@pytest.fixture(scope="module")
def tiled():
    """A loaded LLaVA-NeXT, its prompts, pictures, and the recorded logits behind each prompt and its next token."""
    found = recorded("llava_next")
    bound, config = hub.from_pretrained(GOLDEN / "llava_next", cache=cache.full())
    words, lengths, many = hub.place_pictures(bound.program.config, found["tokens"], config["image_token_index"],
                                              prepared("llava_next", found), found["lengths"])  # fmt: skip
    return bound, words, lengths, many, np.stack([found[f"logits.{i}"][-1] for i in range(2)])


def test_rows_know_their_places(tiled):
    bound, words, lengths, many, _ = tiled
    _, visual = _forward(*bound, many, words)
    for i in range(2):
        places = [np.asarray(m.pos[i])[np.asarray(m.valid[i])] for m in (visual.meta, visual.newlines.meta)]
        every = np.concatenate([*places, many.text[i, : lengths[i]]])
        assert sorted(every) == list(range(len(every))), "one row for each place of the prompt"
        assert (np.diff(places[0]) > 0).all()
    assert visual.x.shape[1] == many.rows <= many.patches.n
    kinds = set(np.unique(visual.meta.labels["kind"])), set(np.unique(visual.newlines.meta.labels["kind"]))
    assert kinds == ({KIND_VISION}, {KIND_NEWLINE})
    assert many.after(lengths).tolist() == [int(m.sum()) for m in recorded("llava_next")["tokens"].astype(bool)]


def test_a_budget_of_every_patch_changes_nothing(tiled):
    """At every site, beside a cache and steering of everything."""
    bound, words, lengths, many, plain = tiled
    total, per = many.patches.n, bound.program.config.visual
    reduce = {"vision.1": tokens.uniform(per), "vision": f"hiprune:keep={total}", "project": tokens.uniform(many.rows),
              "llm.1": tokens.uniform(many.rows)}  # fmt: skip
    model = models.bind(bound, reduce=reduce, cache="streamingllm:start=4,recent=256", steering="zerotuning:gamma=1.0")
    found = np.asarray(_say(*model, many, words, lengths))
    check_logits(found[0], plain)
    assert found[1].argmax(-1).tolist() == recorded("llava_next")["greedy"][:, 1].tolist()


def test_crops_share_a_budget(tiled):
    """Masked rows are gathered rows; each crop keeps its share."""
    bound, words, lengths, many, plain = tiled
    found = {}
    for mode in ("keep", "mask"):
        reduce = {"vision": f"fastervlm:keep={2 * many.crops},mode={mode}", "llm.1": tokens.uniform(many.crops, mode=mode)}
        out, visual = _forward(*models.bind(bound, reduce=reduce), many, words)
        found[mode] = np.stack([out.logits[i, n - 1] for i, n in enumerate(lengths)])
        left = np.asarray(visual.meta.labels["crop"])
        for i in range(2):
            crops, counts = np.unique(left[i][np.asarray(visual.meta.valid[i])], return_counts=True)
            assert len(crops) == len(set(np.asarray(many.patches.labels["crop"])[i][many.patches.valid[i]]))
            assert counts.max() <= 2
    check_logits(found["keep"], found["mask"])
    assert np.abs(found["keep"] - plain).max() > 1e-2


def test_newlines_follow_their_lines(tiled):
    bound, words, _, many, _ = tiled
    left = many.patches.replace(valid=many.patches.valid & (np.arange(many.patches.n) % 7 == 6))
    seen = {rule: np.asarray(pictures.newline_rows(many, jnp.ones(3), left, rule).meta.valid) for rule in pictures.NEWLINES}
    assert (seen["all"] == many.newlines.valid).all() and not seen["none"].any()
    for i in range(2):
        lines = left.labels["line"][i][left.valid[i]]
        assert set(np.flatnonzero(seen["line"][i])) == set(lines[lines >= 0])
    assert 0 < seen["line"].sum() < many.newlines.valid.sum()
    assert models.bind(bound, newlines="none").program.newlines == "none"
    with pytest.raises(ValueError, match="newlines: expected one of"):
        models.bind(bound, newlines="some")


def test_cuts_shorten_the_cache(tiled):
    """Behind the tower and inside the language model, where the scores are the tower's; with a doubled batch."""
    bound, words, lengths, many, plain = tiled
    few = models.bind(bound, cache=cache.full(), reduce={"vision": "hiprune:keep=16", "llm.1": "fastervlm:keep=4"},
                      steering="vhr:layers=(0,1)")  # fmt: skip
    found = np.asarray(_say(*few, many, words, lengths))
    assert np.isfinite(found).all() and np.abs(found[0] - plain).max() > 1e-2
    state = jax.eval_shape(lambda: generation.prefill(few, jnp.asarray(words), image=many, max_new=6)[1])
    ends = many.newlines.pos.shape[1]
    assert [c.state.layer.width for c in state.caches] == [n + ends + words.shape[1] + 6 for n in (16, 4)]


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1000, 500), (672, 336)), ((500, 1000), (336, 672)), ((1000, 1000), (672, 672)), ((400, 1800), (336, 1008)),
     ((100, 50), (336, 672))],  # a small one is whole in every grid: the first with least around it
)
def test_the_best_grid(size, expected):
    grid = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
    assert pictures.best_pinpoint(size, grid) == expected


@pytest.mark.parametrize(
    ("case", "part", "fields", "message"),
    [
        ("llava_next", None, dict(image_grid_pinpoints=[[8, 15]]), r"image_grid_pinpoints = \[\[8, 15\]\] is not supported"),
        ("llava_next", None, dict(image_grid_pinpoints="any"), "image_grid_pinpoints: expected a list of"),
        ("llava_next", None, dict(vision_feature_layer=[-2, -1]), r"vision_feature_layer = \[-2, -1\] is not supported"),
        ("llava_next", None, dict(vision_feature_select_strategy="full"), "vision_feature_select_strategy = 'full'"),
        ("llava_next", None, dict(swirl=1), "not supported: swirl = 1"),
        ("qwen2_5_vl", None, dict(swirl=1), "not supported: swirl = 1"),
        ("qwen2_5_vl", "vision_config", dict(deepstack=[1]), r"vision_config: fields .* not supported: deepstack = \[1\]"),
        ("qwen2_5_vl", "vision_config", dict(window_size=4), "window_size: expected at least a block of 8 pixels"),
        ("qwen2_5_vl", "vision_config", dict(out_hidden_size=23), "out_hidden_size: expected the language model's 24, got 23"),
        ("qwen2_5_vl", "text_config", dict(use_sliding_window=True), "text_config: use_sliding_window = True is not supported"),
        ("qwen2_5_vl", "text_config", dict(rope_parameters=dict(rope_type="default", mrope_section=[1, 1])), "mrope_section"),
    ],
)
def test_configurations_that_are_refused(case, part, fields, message, tmp_path):
    shutil.copytree(GOLDEN / case, tmp_path / "x")
    raw = json.loads((tmp_path / "x" / "config.json").read_text())
    (raw[part] if part else raw).update(fields)
    (tmp_path / "x" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        hub.from_pretrained(tmp_path / "x")


def test_an_older_config_of_qwen(tmp_path):
    """The language model's fields beside the tower's, and M-RoPE as a kind of scaling."""
    shutil.copytree(GOLDEN / "qwen2_5_vl", tmp_path / "x")
    raw = json.loads((tmp_path / "x" / "config.json").read_text())
    text = raw.pop("text_config")
    rope = text.pop("rope_parameters")
    old = {**raw, **{k: v for k, v in text.items() if k != "model_type"}, "rope_theta": rope["rope_theta"],
           "rope_scaling": dict(type="mrope", mrope_section=rope["mrope_section"])}  # fmt: skip
    (tmp_path / "x" / "config.json").write_text(json.dumps(old))
    now, then = (hub.from_pretrained(folder)[0].program.config for folder in (GOLDEN / "qwen2_5_vl", tmp_path / "x"))
    assert now == then


def test_token_methods_on_pictures_of_any_size():
    """A budget of every block changes nothing; cuts behind the tower and in the language model; what cannot be is said."""
    found = recorded("qwen2_5_vl")
    bound, config = hub.from_pretrained(GOLDEN / "qwen2_5_vl", cache=cache.full())
    words, lengths, many = hub.place_pictures(bound.program.config, found["tokens"], config["image_token_id"],
                                              prepared("qwen2_5_vl", found), found["lengths"])  # fmt: skip
    whole = models.bind(bound, reduce={"vision": tokens.uniform(many.patches.n), "llm.1": tokens.uniform(many.rows)},
                        cache="h2o:budget=128,recent=128")  # fmt: skip
    seen = np.asarray(_say(*whole, many, words, lengths))
    check_logits(seen[0], np.stack([found[f"logits.{i}"][-1] for i in range(2)]))
    assert seen[1].argmax(-1).tolist() == found["greedy"][:, 1].tolist()
    few = models.bind(bound, reduce={"vision": "zoo_prune:keep=12", "llm.1": tokens.uniform(4, positions="fresh")},
                      cache="streamingllm:start=2,recent=6")  # fmt: skip
    assert np.isfinite(_say(*few, many, words, lengths)).all()
    with pytest.raises(ValueError, match="reduce: expected a site behind the tower"):
        models.bind(bound, reduce={"vision.1": tokens.uniform(4)})
    with pytest.raises(ValueError, match="expected a tower with a CLS token"):
        jax.eval_shape(lambda: vlm.see(models.bind(bound, reduce={"vision": "fastervlm:keep=8"}), many))
    with pytest.raises(ValueError, match="image: expected Pictures"):
        vlm.see(bound, np.zeros((1, 8, 8, 3), np.float32))
