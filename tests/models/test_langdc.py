"""LangDC: captions decide how many tokens a clip has, and nothing else gets in."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import llm, vit, vlm
from models.bind import Bound
from models.multimodal import langdc
from tests.models.small import quick

generation = importlib.import_module("models.generate")
RNG = np.random.default_rng(0)
TOWER = vit.config(12, 4, 2, 8, 2, channels=1, hidden=8)
CLIP = langdc.ClipConfig(TOWER, llm.tiny(vocab=12, layers=3, dim=16, hidden=16), 16, frames=2, pool=(2, 2))
CONFIG = langdc.LangDCConfig(TOWER, llm.tiny(vocab=20, layers=2, dim=24, hidden=16), 16, caption=CLIP, clips=2, prompt=(1, 2),
                             max_new=5, layer=-2)  # fmt: skip
B = 3
FRAMES = RNG.normal(size=(B, 4, 12, 12, 1)).astype(np.float32)
TEXT = RNG.integers(1, 20, (B, 3)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    fresh = langdc.init(CONFIG)
    return {**fresh, "caption": jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, fresh["caption"])}


@pytest.fixture(scope="module")
def said(params):
    """Captions of all clips, and the config whose stop token one of them says early and another later or never."""
    clips = langdc.clips_of(CONFIG, FRAMES)
    speak = quick(lambda p, clips, stop: langdc.soft_captions(CLIP, p, clips, (1, 2), stop=stop, max_new=5, layer=-2))
    free = np.asarray(speak(params["caption"], clips, -1)[2])
    counts = {int(t): np.asarray(langdc.caption_length(jnp.asarray(free), int(t))) for t in np.unique(free)}
    stop = max(counts, key=lambda t: len(np.unique(counts[t])))
    assert len(np.unique(counts[stop])) >= 3, "captions must differ in length"
    soft, count, words = speak(params["caption"], clips, stop)
    return dataclasses.replace(CONFIG, stop=stop), free, np.asarray(soft), np.asarray(count), np.asarray(words)


def watch(program, arrays, params, video, text, rows=None):
    """(logits, visual rows, their Meta, counts); rows in place of the visual ones."""
    bound = Bound(program, arrays, params)
    visual = langdc.see(bound, video)
    visual = visual if rows is None else visual.replace(x=rows)
    out, visual = langdc.forward(bound, video, text, visual=visual)
    return out.logits, visual.x, visual.meta, visual.evidence["count"]


run = quick(watch, static_argnums=0)


def test_the_end_of_a_caption_decides(said):
    c, free, soft, count, words = said
    for row in range(2 * B):
        ends = np.flatnonzero(free[row] == c.stop)
        assert count[row] == (ends[0] if len(ends) else c.max_new)
        np.testing.assert_array_equal(words[row, : count[row]], free[row, : count[row]])
        assert (words[row, count[row] :] == c.stop).all() and (soft[row, count[row] :] == 0).all()
        assert (np.abs(soft[row, : count[row]]).max(-1) > 0).all()


@pytest.mark.parametrize("layer", [0, 2, -1])
def test_generated_rows_are_those_of_whole_passes(params, said, layer):
    """Teacher forcing with the caption that was generated: another program, the same hidden rows; layer 0 is embeddings."""
    c, _, soft, count, words = said
    clips = langdc.clips_of(CONFIG, FRAMES)
    kw = dict(prompt=(1, 2), stop=c.stop, layer=layer)
    forced, n = quick(functools.partial(langdc.forced_captions, CLIP, **kw))(params["caption"], clips, words=words)
    np.testing.assert_array_equal(n, count)
    if layer == -1:
        soft = quick(functools.partial(langdc.soft_captions, CLIP, max_new=5, **kw))(params["caption"], clips)[0]
    if layer == 0:  # the row that predicts word i is word i - 1, the last of the prompt for the first
        before = np.concatenate([np.full((2 * B, 1), 2), words[:, :-1]], 1)
        live = np.arange(5) < count[:, None]
        soft = np.where(live[..., None], np.asarray(params["caption"]["llm"]["embed"]["embedding"])[before], 0)
    np.testing.assert_allclose(forced, soft, atol=1e-4)


def test_clips_are_compressed_alone_and_padding_says_nothing(params, said):
    c, *_, count, _ = said
    bound = langdc.bind(c, params)
    video = langdc.Video(FRAMES)
    logits, x, meta, found = run(*bound, video, TEXT)
    np.testing.assert_array_equal(found.reshape(-1), count)
    live = np.asarray(meta.valid)
    np.testing.assert_array_equal(live.sum(-1), count.reshape(B, 2).sum(-1))
    for b in range(B):  # no gaps, clip by clip, the last row right in front of the text
        clip, pos = np.asarray(meta.labels["clip"])[b][live[b]], np.asarray(meta.pos)[b][live[b]]
        np.testing.assert_array_equal(clip, np.repeat([0, 1], count.reshape(B, 2)[b]))
        np.testing.assert_array_equal(pos, np.arange(10 - live[b].sum(), 10))
    other = FRAMES.copy()
    other[:, 2:] = RNG.normal(size=other[:, 2:].shape)
    _, y, _, again = run(*bound, langdc.Video(other), TEXT)
    np.testing.assert_array_equal(again[:, 0], found[:, 0])
    for b in range(B):
        n = int(found[b, 0])
        np.testing.assert_allclose(y[b, :n], x[b, :n], atol=1e-5)
    assert (np.asarray(again[:, 1]) != np.asarray(found[:, 1])).any() or np.abs(y - x).max() > 1e-3
    # What stands in rows that are not valid reaches nothing.
    rows = jnp.where(jnp.asarray(live)[..., None], x, 1e3)
    np.testing.assert_allclose(run(*bound, video, TEXT, rows)[0], logits, atol=1e-5)


def test_training_reads_given_captions_and_leaves_the_caption_model_alone(params, said):
    c, _, _, count, words = said
    bound = langdc.bind(c, params)
    video = langdc.Video(FRAMES)
    told = video.replace(captions=jnp.asarray(words).reshape(B, 2, 5))
    for a, b in zip(run(*bound, video, TEXT)[:2], run(*bound, told, TEXT)[:2], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    grads = quick(jax.grad(lambda p: watch(bound.program, bound.arrays, p, told, TEXT)[0].sum()))(params)
    size = {name: max(float(np.abs(x).max()) for x in jax.tree.leaves(tree)) for name, tree in grads.items()}
    assert size["caption"] == 0 and size["projector"] > 0 and size["llm"] > 0


def test_the_stop_token_is_learnt_too(params):
    clips = langdc.clips_of(CONFIG, FRAMES)[:2]
    words = np.array([[3, 4, 0, 0], [5, 0, 9, 9]], np.int32)
    asked = np.concatenate([np.tile([1, 2], (2, 1)), words[:, :-1]], 1).astype(np.int32)

    @quick
    def learn(p):
        loss = lambda p: langdc.caption_loss(CLIP, p, clips, (1, 2), words, stop=0)  # noqa: E731
        return *jax.value_and_grad(loss)(p), vlm.forward(vlm.bind(CLIP, p), clips, asked)[0].logits[:, 1:]

    loss, grads, logits = learn(params["caption"])
    logp = np.asarray(jax.nn.log_softmax(logits))
    want = [logp[0, 0, 3], logp[0, 1, 4], logp[0, 2, 0], logp[1, 0, 5], logp[1, 1, 0]]
    np.testing.assert_allclose(loss, -np.mean(want), rtol=1e-5)
    assert np.abs(grads["llm"]["embed"]["embedding"]).max() > 0


def test_generation(params, said):
    """The usual way from a prompt to its answer reads a video as it reads an image."""
    model = langdc.bind(said[0], params, cache="full")
    ask = quick(lambda arrays, video: generation.prefill(model._replace(arrays=arrays), TEXT, image=video, max_new=1)[0])
    logits = run(*langdc.bind(said[0], params), langdc.Video(FRAMES), TEXT)[0]
    np.testing.assert_allclose(ask(model.arrays, langdc.Video(FRAMES)), logits[:, -1], atol=1e-4)


def test_a_branch_of_pooled_patches(params, said):
    c = dataclasses.replace(said[0], branch=(1, 3))
    assert c.visual == 2 * 2 * 3 + 10
    bound = langdc.bind(c, {**langdc.init(c), "caption": params["caption"]})
    told = langdc.Video(FRAMES, jnp.asarray(said[4]).reshape(B, 2, 5))
    visual = quick(lambda p, video: langdc.see(bound._replace(params=p), video))(bound.params, told)
    assert visual.x.shape[1] == 22
    for b in range(B):
        pos = np.asarray(visual.meta.pos)[b][np.asarray(visual.meta.valid)[b]]
        np.testing.assert_array_equal(pos, np.arange(22 - len(pos), 22))
    with pytest.raises(ValueError, match="layer: expected a number in"):
        dataclasses.replace(c, layer=4)
    with pytest.raises(ValueError, match=r"frames: expected \[batch, 4, height"):
        langdc.see(bound, langdc.Video(FRAMES[:, :3]))
