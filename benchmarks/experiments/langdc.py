"""LangDC on digit scenes: a trained scene model describes each scene of a short video, its hidden rows are the video's
tokens, and a small language model answers about them.

    python -m benchmarks.experiments.langdc --caption runs/demo

Printed: soft tokens by number of digits in a scene, and questions answered right with generated and with given captions.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from models.bind import Bound
from models.language import llm
from models.multimodal import langdc
from train import tasks
from train.data.pipeline import split_scenes
from train.data.questions import Vocabulary, digit_id

PROMPT, NEW, ASKED = "read all digits ?", 8, "is there a _ ?"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Train the main language model of a LangDC on videos of digit scenes."""

    caption: Path = Path("runs/demo")
    """A run of `python -m train vlm` that was trained to read scenes aloud: the caption model."""
    clips: int = 2
    """Scenes of a video."""
    videos: int = 1000
    """To train on; a fifth as many are held out."""
    steps: int = 400
    batch: int = 100
    layer: int = -1
    """Whose hidden rows are the tokens; 0 is what enters the first layer."""
    lr: float = 1e-3
    fresh: bool = False
    """Start the main language model from nothing instead of the caption model's: such a small one does not learn to compare a
    question's digit with what it sees from yes and no alone."""
    layers: int = 2
    """Of a fresh one, as dim."""
    dim: int = 64
    seed: int = 0


def described(split: str, count: int, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(images [S, H, W, 1], captions int32 [S, NEW], presence bool [S, 10]) of scenes."""
    scenes = split_scenes(split, count, seed=7)
    words = np.full((count, NEW), vocabulary.ids["end"], np.int32)
    for row, cells in enumerate(scenes.digit):
        shown = cells[cells >= 0]
        words[row, : len(shown)] = digit_id(shown)
    return scenes.images[..., None], words, scenes.presence > 0


def questions(presence: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [V, 6], answer int32 [V]): a digit that is in the video, or one that is not, half of each."""
    yes = rng.random(len(presence)) < 0.5
    among = np.where(yes[:, None], presence, ~presence)
    asked = (rng.random(presence.shape) * among).argmax(1)
    return vocabulary.fill(ASKED, digit_id(asked)), np.where(yes, vocabulary.ids["yes"], vocabulary.ids["no"])


def encode(c: langdc.LangDCConfig, params: dict, images: np.ndarray, words: np.ndarray | None, size: int = 50):
    """(soft [V, clips, M, C], count [V, clips]) of videos, a batch at a time."""
    run = jax.jit(lambda p, video: langdc.captions(c, p, video))
    frames = images.reshape(-1, c.clips, *images.shape[1:])
    told = None if words is None else words.reshape(-1, c.clips, words.shape[-1])
    found = []
    for i in range(0, len(frames), size):
        part = None if told is None else jnp.asarray(told[i : i + size])
        found.append(jax.device_get(run(params, langdc.Video(jnp.asarray(frames[i : i + size]), part))))
    return tuple(np.concatenate(x) for x in zip(*found, strict=True))


def by_digits(count: np.ndarray, digits: np.ndarray) -> dict[int, float]:
    """{digits in a scene: mean soft tokens} of counts and numbers of digits [S]."""
    return {int(d): float(count[digits == d].mean()) for d in np.unique(digits)}


def run(e: Experiment) -> dict[str, float]:
    """Train and print; returns the figures."""
    vocabulary, found = Vocabulary(), tasks.load(e.caption)
    caption = found.program.config
    main = llm.config(len(vocabulary), e.layers, e.dim, 4, hidden=2 * e.dim, base=1000.0) if e.fresh else caption.llm
    prompt = tuple(int(i) for i in vocabulary.encode(PROMPT))
    c = langdc.LangDCConfig(caption.vision, main, 2 * main.block.dim, caption=caption, clips=e.clips, prompt=prompt,
                            stop=vocabulary.ids["end"], max_new=NEW, layer=e.layer)  # fmt: skip
    frozen = {name: tree for name, tree in found.params.items() if name in ("vision", "projector", "llm")}
    params = {**langdc.init(c, e.seed), "caption": frozen}
    bound = langdc.bind(c, None)

    data, held_out = {}, max(1, e.videos // 5)
    for split, videos in (("train", e.videos), ("validation", held_out)):
        images, words, presence = described(split, videos * e.clips, vocabulary)
        of_video = presence.reshape(videos, e.clips, -1).any(1)
        given = encode(c, params, images, words)
        made = encode(c, params, images, None) if split == "validation" else None
        data[split] = (given, made, of_video, words)
        print(f"{split}: {videos} videos of {e.clips} scenes", flush=True)

    _, made, _, words = data["validation"]
    digits = np.asarray(langdc.caption_length(jnp.asarray(words), c.stop))
    table = by_digits(made[1].reshape(-1), digits)
    print("soft tokens of a scene by its digits: " + "  ".join(f"{d}: {n:.2f}" for d, n in table.items()), flush=True)

    def logits(mine, soft, count, tokens):
        every = {**mine, "caption": {}}
        visual = langdc.rows_of(c, every, soft, count)
        return langdc.forward(Bound(bound.program, bound.arrays, every), soft, tokens, visual=visual)[0].logits[:, -1]

    mine = {name: tree for name, tree in params.items() if name != "caption"}
    mine |= {} if e.fresh else {"llm": frozen["llm"]}
    optimizer = optax.adamw(optax.cosine_decay_schedule(e.lr, e.steps), weight_decay=0.01)
    state, rng = optimizer.init(mine), np.random.default_rng(e.seed)

    @jax.jit
    def step(mine, state, soft, count, tokens, answer):
        def loss(mine):
            found = logits(mine, soft, count, tokens)
            return optax.softmax_cross_entropy_with_integer_labels(found, answer).mean()

        value, gradient = jax.value_and_grad(loss)(mine)
        update, state = optimizer.update(gradient, state, mine)
        return optax.apply_updates(mine, update), state, value

    (soft, count), _, presence, _ = data["train"]
    for i in range(e.steps):
        rows = rng.integers(0, e.videos, e.batch)
        tokens, answer = questions(presence[rows], vocabulary, rng)
        mine, state, value = step(mine, state, soft[rows], count[rows], tokens, answer)
        if i % 200 == 0 or i + 1 == e.steps:
            print(f"step {i}  loss {float(value):.3f}", flush=True)

    given, made, presence, _ = data["validation"]
    tokens, answer = questions(presence, vocabulary, np.random.default_rng(1))
    right = lambda x: float((np.asarray(jax.jit(logits)(mine, *x, tokens)).argmax(-1) == answer).mean())  # noqa: E731
    figures = {
        "generated": right(made), "given": right(given), "blind": right((np.zeros_like(made[0]), np.zeros_like(made[1]))),
        "tokens": float(made[1].sum(1).mean()), "patches": float(e.clips * caption.visual),
        "correlation": float(np.corrcoef(made[1].reshape(-1), digits)[0, 1]),
    }  # fmt: skip
    print("  ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    return figures


if __name__ == "__main__":
    run(tyro.cli(Experiment))
