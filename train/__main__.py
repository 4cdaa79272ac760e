"""python -m train {lm,vit,vlm}: train a model; `python -m train lm --help` lists the flags. `python -m train convert`
runs a method's offline search or calibration on a trained one.

Exit status: 0 when trained, 1 for an error, 130 when ctrl-C (or SIGTERM) stopped it, after saving; the same
command then continues.
"""

import os
import sys
from typing import Annotated

import tyro

from train import backend, convert
from train.config import LM, VLM, Common, ViT
from train.loop import INTERRUPTED, fit

Task = (
    Annotated[LM, tyro.conf.subcommand("lm")]
    | Annotated[ViT, tyro.conf.subcommand("vit")]
    | Annotated[VLM, tyro.conf.subcommand("vlm")]
    | Annotated[convert.Convert, tyro.conf.subcommand("convert")]
)


def run(config: Common) -> int:
    """Train what `config` describes; returns the exit status."""
    backend.start(devices=config.devices, **vars(config.hosts))
    from models.cores import keep_memory
    from train import tasks  # imports models, whose constants may touch the backend

    keep_memory()
    mesh = config.mesh.make()
    config = tasks.started(config)
    task = tasks.build(config)
    params = task.params
    if not config.steps and getattr(config, "init", None) is not None:
        found = task.stages[-1].evaluator(config.eval_batches, mesh)({**task.stages[-1].frozen, **params}, 0)
        print("  ".join(f"{name} {float(x):.4g}" for name, x in found.items()))
        return 0
    for stage in task.stages:
        folder = config.folder / stage.folder
        names = stage.params or tuple(params)
        result = fit(
            stage.loss_fn,
            {name: params[name] for name in names},
            iter(stage.batches),
            optimizer=config.make_optimizer(stage.steps, stage.groups),
            steps=stage.steps,
            mesh=mesh,
            accumulate=config.accumulate,
            seed=config.seed,
            checkpoint_dir=folder / "checkpoints",
            save_every=config.save_every,
            keep=config.keep,
            resume=config.resume,
            config=config.record(),
            log_every=config.log_every,
            metrics_path=folder / "metrics.jsonl",
            plot_path=folder / "loss.png",
            eval_fn=stage.evaluator(config.eval_batches, mesh),
            eval_every=config.eval_every,
            title=f"{config.task} {stage.folder}".strip(),
            unit=task.unit,
            frozen=stage.frozen,
        )
        if result.interrupted:
            return INTERRUPTED
        params = {**params, **result.params}
    if task.export is not None:
        task.export(params)
    return 0


def main(args: list[str] | None = None) -> int:
    config = tyro.cli(Task, prog="python -m train", args=args)
    try:
        return convert.run(config) if isinstance(config, convert.Convert) else run(config)
    except KeyboardInterrupt:  # before the first step, or asked twice
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("TRAIN_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
