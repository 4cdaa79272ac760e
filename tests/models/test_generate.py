"""Generation against whole passes; sampling; stopping; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from jaxattn import cache
from models import llm, sampling, vlm
from tests.models.small import LENGTHS, LLM, VLM, images, llm_params, look, prompts, read, rollout, vlm_params

STEPS = 6


@pytest.fixture(scope="module")
def language():
    return llm.bind(LLM, llm_params(), cache=cache.full())


@pytest.fixture(scope="module")
def greedy(language):
    return np.asarray(models.generate(language, prompts(), lengths=LENGTHS, steps=STEPS))


def test_greedy_generation_is_the_argmax_of_whole_passes(language, greedy):
    expected = rollout(lambda x: read(language.program, language.arrays, language.params, x), prompts(), LENGTHS, STEPS)
    np.testing.assert_array_equal(greedy, expected)
    assert len(np.unique(greedy)) > 3, "a prompt that says nothing tests nothing"


def test_rows_of_a_batch_do_not_see_each_other_nor_padding(language, greedy):
    tokens = prompts()
    tokens[1, LENGTHS[1] :] = 7  # padding may hold anything
    again = models.generate(language, tokens, lengths=LENGTHS, steps=STEPS)
    np.testing.assert_array_equal(again, greedy)
    alone = models.generate(language, tokens[1:, : LENGTHS[1]], steps=STEPS)
    np.testing.assert_array_equal(alone[0], greedy[1])


def test_vision_language_generation_is_the_argmax_of_whole_passes():
    bound = vlm.bind(VLM, vlm_params(), cache=cache.full())
    found = models.generate(bound, prompts(), image=images(), lengths=LENGTHS, steps=STEPS)
    expected = rollout(lambda x: look(*bound, images(), x), prompts(), LENGTHS, STEPS)
    np.testing.assert_array_equal(found, expected)
    other = models.generate(bound, prompts(), image=1 - images(), lengths=LENGTHS, steps=STEPS)
    assert (np.asarray(other) != np.asarray(found)).any(), "the image must matter"


def test_stop_and_padding_and_streams(language, greedy):
    stop = int(greedy[0, 2])
    first = [row.tolist().index(stop) if stop in row else STEPS for row in greedy]
    expected = np.array([[t if i <= f else 39 for i, t in enumerate(row)] for row, f in zip(greedy, first, strict=True)])
    found = models.generate(language, prompts(), lengths=LENGTHS, steps=STEPS, stop=stop, pad=39)
    np.testing.assert_array_equal(found, expected)

    streamed = np.stack(list(models.stream(language, prompts(), lengths=LENGTHS, steps=STEPS)), 1)
    np.testing.assert_array_equal(streamed, greedy)
    short = list(models.stream(language, prompts()[:1], steps=STEPS, stop=stop))
    assert len(short) == first[0] + 1 and int(short[-1][0]) == stop, "a stream ends when every row is done"
    stopped = np.stack(list(models.stream(language, prompts(), lengths=LENGTHS, steps=STEPS, stop=stop, pad=39)), 1)
    np.testing.assert_array_equal(stopped, expected[:, : stopped.shape[1]])


def test_one_step_and_sampled_seeds(language, greedy):
    np.testing.assert_array_equal(models.generate(language, prompts(), lengths=LENGTHS, steps=1), greedy[:, :1])
    warm = sampling.sample(2.0)
    keys = [jax.random.key(0), jax.random.key(1)]  # used again: nobody donates what the caller holds
    a, b, c = (models.generate(language, prompts(), lengths=LENGTHS, steps=STEPS, sampler=warm, key=keys[s])
               for s in (0, 0, 1))  # fmt: skip
    np.testing.assert_array_equal(a, b)
    assert (np.asarray(a) != np.asarray(c)).any()
    streamed = models.stream(language, prompts(), lengths=LENGTHS, steps=STEPS, sampler=warm, key=keys[0])
    np.testing.assert_array_equal(np.stack(list(streamed), 1), a)
    cold = models.generate(language, prompts(), lengths=LENGTHS, steps=STEPS, sampler=sampling.sample(1e-4))
    np.testing.assert_array_equal(cold, greedy)


LOGITS = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32))


def shares(temperature=1.0, top_k=None, top_p=None, n=20000):
    from jaxattn.core.types import Ctx, State, split

    sampler, params = split(sampling.sample(temperature, top_k, top_p))
    rows = jnp.broadcast_to(LOGITS, (n, 5))
    token, _, done = jax.jit(lambda p, k: sampler.step(p, State(), rows, None, Ctx(key=k)))(params, jax.random.key(3))
    assert not np.asarray(done).any()
    return np.bincount(token, minlength=5) / n


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [({}, 5), ({"top_k": 2}, 2), ({"top_p": 0.7}, 2), ({"top_p": 0.71}, 3), ({"top_k": 3, "top_p": 0.6}, 2), ({"top_k": 9}, 5)],
)  # fmt: skip
def test_samplers_draw_from_the_truncated_distribution(arguments, kept):
    p = np.exp(LOGITS) * (np.arange(5) < kept)
    np.testing.assert_allclose(shares(**arguments), p / p.sum(), atol=0.015)


def test_temperature_comes_before_top_p():
    p = np.exp(2 * LOGITS)  # 0.55, 0.31, 0.08 ...: two tokens cover 0.8 now, three did before
    p = p * (np.arange(5) < 2)
    np.testing.assert_allclose(shares(0.5, top_p=0.8), p / p.sum(), atol=0.015)


def test_what_is_refused(language):
    with pytest.raises(ValueError, match=r"tokens: expected \[batch, prompt tokens\].*\(9,\)"):
        models.generate(language, prompts()[0], steps=2)
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        models.generate(language, prompts(), steps=0)
    with pytest.raises(ValueError, match="cache: expected a policy"):
        models.generate(llm.bind(LLM, llm_params()), prompts(), steps=2)
    with pytest.raises(ValueError, match="image: expected an image per prompt"):
        models.generate(vlm.bind(VLM, vlm_params(), cache=cache.full()), prompts(), steps=2)
    with pytest.raises(ValueError, match=r"image: expected \[batch, 12, 12, 2\]"):
        models.generate(vlm.bind(VLM, vlm_params(), cache=cache.full()), prompts(), image=images()[:, :9], steps=2)
    with pytest.raises(ValueError, match="lengths: expected"):
        models.generate(language, prompts(), lengths=[9, 10], steps=2)
    with pytest.raises(ValueError, match="lengths: expected"):
        models.generate(language, prompts(), lengths=[9], steps=2)
    with pytest.raises(ValueError, match="temperature: expected above 0"):
        sampling.sample(0.0)
    with pytest.raises(ValueError, match="top_p: expected in"):
        sampling.sample(top_p=1.5)
    with pytest.raises(ValueError, match="top_k: expected at least 1"):
        sampling.sample(top_k=0)
