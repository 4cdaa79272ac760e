"""Data: real text, digits and scenes that come with the environment, synthetic recall, and the user's own
files."""

from train.data.pipeline import (
    Batches,
    lm_dataset,
    make_tokenizer,
    recall_dataset,
    split_scenes,
    vit_dataset,
    vlm_dataset,
)
from train.data.questions import KINDS, MIX, Vocabulary, render
from train.data.scenes import SceneConfig
from train.data.text import CheckpointTokenizer

__all__ = [
    "KINDS",
    "MIX",
    "Batches",
    "CheckpointTokenizer",
    "SceneConfig",
    "Vocabulary",
    "lm_dataset",
    "make_tokenizer",
    "recall_dataset",
    "render",
    "split_scenes",
    "vit_dataset",
    "vlm_dataset",
]
