"""Pictures as tiles and several pictures in a prompt: what transformers computes, and token methods on such rows."""

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


def _forward(program, arrays, params, pixels, words):
    return vlm.forward(models.Bound(program, arrays, params), pixels, words)


_forward = jax.jit(_forward, static_argnums=0)


@pytest.mark.parametrize("case", MANY)
def test_pictures_of_many_shapes(case):
    """Processor, logits behind every picture, 64 greedy tokens: pictures of several shapes, padded rows."""
    found = recorded(case)
    bound, config = hub.from_pretrained(GOLDEN / case, cache=cache.full())
    c, mark = bound.program.config, config.get("image_token_index", config.get("image_token_id"))
    rows = prepared(case, found)
    words, lengths, many = hub.place_pictures(c, found["tokens"], mark, rows, found["lengths"])
    out, visual = _forward(*bound, many, words)
    for i, n in enumerate(lengths):
        check_logits(out.logits[i, :n], found[f"logits.{i}"])
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
    new = models.generate(bound, words, steps=8, lengths=lengths, image=many)
    np.testing.assert_array_equal(new, found["greedy"][:, :8])
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
    """A loaded LLaVA-NeXT, its prompts, pictures and plain logits."""
    found = recorded("llava_next")
    bound, config = hub.from_pretrained(GOLDEN / "llava_next", cache=cache.full())
    words, lengths, many = hub.place_pictures(bound.program.config, found["tokens"], config["image_token_index"],
                                              prepared("llava_next", found), found["lengths"])  # fmt: skip
    plain = _forward(*bound, many, words)[0].logits
    return bound, words, lengths, many, np.asarray(plain)


def close(ours, theirs, lengths, atol=2e-4):
    for a, b, n in zip(np.asarray(ours), np.asarray(theirs), lengths, strict=True):
        np.testing.assert_allclose(a[:n], b[:n], atol=atol)


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


def test_token_methods_on_tiles(tiled):
    """A budget of every patch changes nothing, at every site; masked rows are gathered rows; crops share a budget."""
    bound, words, lengths, many, plain = tiled
    total, per = many.patches.n, bound.program.config.visual

    def logits(reduce, **more):
        model = models.bind(bound, reduce=reduce, **more)
        out, visual = _forward(*model, many, words)
        return out.logits, visual

    whole = {"vision.1": tokens.uniform(per), "vision": f"hiprune:keep={total}", "project": tokens.uniform(many.rows)}
    close(logits(whole)[0], plain, lengths)
    found = {}
    for mode in ("keep", "mask"):
        reduce = {"vision": f"fastervlm:keep={2 * many.crops},mode={mode}",
                  "llm.1": tokens.uniform(many.crops, mode=mode)}  # fmt: skip
        found[mode], visual = logits(reduce)
        left = np.asarray(visual.meta.labels["crop"])
        for i in range(2):
            crops, counts = np.unique(left[i][np.asarray(visual.meta.valid[i])], return_counts=True)
            assert len(crops) == len(set(np.asarray(many.patches.labels["crop"])[i][many.patches.valid[i]]))
            assert counts.max() <= 2
    close(found["keep"], found["mask"], lengths)
    assert np.abs(np.asarray(found["keep"]) - plain).max() > 1e-2


def test_newlines_follow_their_lines(tiled):
    bound, words, lengths, many, plain = tiled
    one = {"vision": tokens.uniform(3)}
    seen = {}
    for rule in pictures.NEWLINES:
        model = models.bind(bound, reduce=one, newlines=rule)
        seen[rule] = vlm.see(model, many)
    assert (np.asarray(seen["all"].newlines.meta.valid) == many.newlines.valid).all()
    assert not np.asarray(seen["none"].newlines.meta.valid).any()
    meta, ends = seen["line"].meta, np.asarray(seen["line"].newlines.meta.valid)
    for i in range(2):
        lines = np.asarray(meta.labels["line"][i])[np.asarray(meta.valid[i])]
        assert set(np.flatnonzero(ends[i])) == set(lines[lines >= 0])
    assert 0 < ends.sum() < many.newlines.valid.sum()
    with pytest.raises(ValueError, match="newlines: expected one of"):
        models.bind(bound, newlines="some")


def test_generation_with_methods(tiled):
    """Cuts inside the language model shorten the cache; a cache and steering of everything give the plain text."""
    bound, words, lengths, many, _ = tiled
    plain = np.asarray(models.generate(bound, words, steps=6, lengths=lengths, image=many))
    same = models.bind(bound, cache="streamingllm:start=4,recent=256", steering="zerotuning:gamma=1.0",
                       reduce={"llm.1": tokens.uniform(many.rows)})  # fmt: skip
    np.testing.assert_array_equal(models.generate(same, words, steps=6, lengths=lengths, image=many), plain)
    few = models.bind(bound, cache=cache.full(), reduce={"vision": "hiprune:keep=16", "llm.1": tokens.uniform(4)},
                      steering="vhr:layers=(0,1)")  # fmt: skip
    other = models.generate(few, words, steps=6, lengths=lengths, image=many)
    assert other.shape == plain.shape
    state = jax.eval_shape(lambda: models.generate.__globals__["prefill"](few, jnp.asarray(words), image=many, max_new=6)[1])
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
    plain = models.generate(bound, words, steps=5, lengths=lengths, image=many)
    np.testing.assert_array_equal(plain, found["greedy"][:, :5])
    whole = models.bind(bound, reduce={"vision": tokens.uniform(many.patches.n), "llm.1": tokens.uniform(many.rows)},
                        cache="h2o:budget=128,recent=128")  # fmt: skip
    np.testing.assert_array_equal(models.generate(whole, words, steps=5, lengths=lengths, image=many), plain)
    few = models.bind(bound, reduce={"vision": "zoo_prune:keep=12", "llm.1": tokens.uniform(4, positions="fresh")},
                      cache="streamingllm:start=2,recent=6")  # fmt: skip
    assert models.generate(few, words, steps=5, lengths=lengths, image=many).shape == plain.shape
    with pytest.raises(ValueError, match="reduce: expected a site behind the tower"):
        models.bind(bound, reduce={"vision.1": tokens.uniform(4)})
    with pytest.raises(ValueError, match="expected a tower with a CLS token"):
        vlm.see(models.bind(bound, reduce={"vision": "fastervlm:keep=8"}), many)
    with pytest.raises(ValueError, match="image: expected Pictures"):
        vlm.see(bound, np.zeros((1, 8, 8, 3), np.float32))
