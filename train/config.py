"""The command line: one dataclass per task, every field a flag; what they share comes first."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax

from train.optim import make_optimizer, schedule
from train.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Sizes of the mesh axes; -1: the devices that the others leave. All 1: one device, no mesh."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def make(self) -> jax.sharding.Mesh | None:
        sizes = dataclasses.asdict(self)
        if jax.device_count() == 1 and set(sizes.values()) <= {1, -1}:
            return None
        if set(sizes.values()) == {1} and jax.process_count() == 1:
            return None
        return make_mesh(**sizes)


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Several processes, on one machine or many: each is started with the same flags and its own process-id."""

    coordinator: str | None = None
    """Address of process 0, host:port. None: a single process."""
    num_processes: int = 1
    process_id: int = 0


@dataclasses.dataclass(frozen=True)
class Common:
    task: ClassVar[str]

    data: Path | None = None
    """Own files; None: the data that comes with the environment."""
    out: Path | None = None
    """Folder of checkpoints, metrics and curve; None: runs/<task>."""
    steps: int = 1000
    batch: int = 16
    """Rows of a step, over all devices and accumulated parts."""
    seed: int = 0
    lr: float = 2e-3
    optimizer: Literal["adamw", "muon"] = "adamw"
    b2: float = 0.95
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest global norm of the gradient."""
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    warmup: int = 40
    """Steps of linear rise."""
    flat: float = 0.3
    """Share of the steps before "wsd" decays."""
    accumulate: int = 1
    """Parts of a batch, computed one after another."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters and optimizer stay float32."""
    remat: bool = False
    """Compute the layers' activations again in the backward pass instead of keeping them."""
    save_every: int = 200
    keep: int = 3
    """Newest checkpoints that stay."""
    log_every: int = 20
    eval_every: int = 200
    eval_batches: int = 8
    resume: bool = True
    """Continue from the latest checkpoint in `out`; otherwise a folder that has one is refused."""
    devices: int | None = None
    """Virtual CPU devices of this process (CPU only); None: one."""
    mesh: Mesh = Mesh()
    hosts: Hosts = Hosts()

    @property
    def folder(self) -> Path:
        return Path("runs") / self.task if self.out is None else self.out

    def make_optimizer(self, steps: int, groups: Mapping[str, float] | None = None):
        """The optimizer of a stage of `steps` steps; a stage shorter than the warm-up rises to its end."""
        rate = schedule(self.schedule, self.lr, steps=steps, warmup=min(self.warmup, steps), flat=self.flat)
        return make_optimizer(
            self.optimizer, rate, b2=self.b2, weight_decay=self.weight_decay, clip=self.clip, groups=groups
        )

    def record(self) -> dict[str, Any]:
        """What decides the run, as values of JSON: kept in its checkpoints."""
        where = ("out", "save_every", "keep", "log_every", "eval_every", "eval_batches", "resume", "devices", "hosts", "merge")
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in where}
        return {"task": self.task, **{k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}}


@dataclasses.dataclass(frozen=True)
class LM(Common):
    """A Llama-like language model on text; by default on the source of Python's standard library."""

    task: ClassVar[str] = "lm"

    init: Path | None = None
    """Directory of a checkpoint in the Hugging Face format to start from: its model and its tokenizer."""
    lora: str | None = None
    """Train adapters beside the frozen checkpoint, "rank=8,alpha=16,targets=q+v,dropout=0.05"; they are written in PEFT's
    layout to <out>/adapter. None: train all of it."""
    merge: Path | None = None
    """Also write the tuned checkpoint here, adapters merged, in the Hugging Face format."""
    length: int = 256
    """Tokens of a window."""
    tokenizer: str | None = None
    """byte, bpe, or the path of a tokenizer.json; None: byte, or the checkpoint's."""
    vocab_size: int = 4096
    """Of a bpe that is trained here."""
    dim: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 704
    tied: bool = False
    qk_norm: bool = False
    attention: str | None = None
    """A method as "name:arg=value,..."; None: dense."""


@dataclasses.dataclass(frozen=True)
class ViT(Common):
    """An image classifier; by default on handwritten digits."""

    task: ClassVar[str] = "vit"

    size: int = 16
    """Side of the square image, in pixels."""
    patch: int = 4
    dim: int = 64
    layers: int = 3
    heads: int = 4
    mlp: int = 256
    attention: str | None = None
    """A method as "name:arg=value,..."; None: dense."""
    tokens: tuple[str, ...] = ()
    """Token methods as "name:arg=value,...@site"; sites are vision (which may be left out) and vision.<layer>."""
    objective: str | None = None
    """What to minimise, as "name:arg=value,..."; None: what the method's name has, else the classes' cross-entropy."""
    init: Path | None = None
    """A run of this task to start from, with its shape; steps 0 only evaluates it."""

    shape: ClassVar[tuple[str, ...]] = ("size", "patch", "dim", "layers", "heads", "mlp")


@dataclasses.dataclass(frozen=True)
class VLM(Common):
    """A LLaVA-like model that answers questions on images; by default on scenes of digits."""

    task: ClassVar[str] = "vlm"

    steps: int = 1800
    batch: int = 8
    optimizer: Literal["adamw", "muon"] = "muon"
    b2: float = 0.98
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine", "wsd"] = "wsd"
    flat: float = 0.5
    size: int = 96
    patch: int = 8
    dim: int = 96
    layers: int = 3
    heads: int = 4
    kv_heads: int = 4
    mlp: int = 256
    vision_dim: int = 64
    vision_layers: int = 3
    vision_heads: int = 4
    vision_mlp: int = 256
    vision_lr: float = 0.3
    """Factor on the learning rate of the vision tower."""
    vision_steps: int = 900
    """Steps of a first stage, in which the tower learns alone on crowded scenes; none with own files."""
    vision_batch: int = 16
    auxiliary: float = 0.3
    """Weight of the vision losses beside the answers'; none with own files."""
    scenes: int = 12000
    """Scenes to train on; the first stage has half as many of its own."""
    transcripts: bool = True
    """Also learn to read several digits, one word after another; not with own files."""
    questions: int | None = None
    """Of a scene, that are asked together, in turn of all kinds; None: all nine. One lets a method answer to the question;
    not with own files."""
    length: int = 128
    """Tokens of question and answer, with own files."""
    tokenizer: str = "byte"
    """byte, or the path of a tokenizer.json; with own files."""
    attention: str | None = None
    """A method of the language model as "name:arg=value,..."; None: dense."""
    tokens: str | None = None
    """A method that prunes visual tokens while training, or several as "name:arg=value@site + name:arg=value@site"; None: all
    are kept."""
    tokens_at: str = "vision"
    """Where it acts, if it does not say: vision, vision.<layer>, project, llm or llm.<layer>."""
    objective: str | None = None
    """What to minimise, as "name:arg=value,..."; None: what the method's name has, else the losses of the task."""
    init: Path | None = None
    """A run of this task to start from, with its shape and without its first stage; steps 0 only evaluates it."""

    shape: ClassVar[tuple[str, ...]] = (
        "size", "patch", "dim", "layers", "heads", "kv_heads", "mlp", "vision_dim", "vision_layers", "vision_heads",
    )  # fmt: skip
