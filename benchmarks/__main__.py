"""python -m benchmarks {cost,demo,kernels,prefill,tokens,tune}: boards of what methods keep and cost, times of prefills,
kernels beside their peers, sizes of kernels measured on this machine;
`python -m benchmarks demo --help` lists the flags.

Exit status: 0 when written, 1 for an error, 130 when ctrl-C (or SIGTERM) stopped it; the same command then continues.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

# A board compiles a program per method and budget: a second run finds them all. Said before JAX is imported.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import tyro  # noqa: E402

from benchmarks import cost_study, kernels, prefill, tokens, tune  # noqa: E402
from benchmarks.demo import Demo, run  # noqa: E402
from models.cores import keep_memory  # noqa: E402
from train.loop import INTERRUPTED  # noqa: E402

Board = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[cost_study.Cost, tyro.conf.subcommand("cost")]
    | Annotated[tokens.Tokens, tyro.conf.subcommand("tokens")]
    | Annotated[kernels.Kernels, tyro.conf.subcommand("kernels")]
    | Annotated[prefill.Prefill, tyro.conf.subcommand("prefill")]
    | Annotated[tune.Tune, tyro.conf.subcommand("tune")]
)
RUN = {Demo: run, cost_study.Cost: cost_study.run, kernels.Kernels: kernels.run, prefill.Prefill: prefill.run,
       tokens.Tokens: tokens.run, tune.Tune: tune.run}  # fmt: skip


def main(args: list[str] | None = None) -> int:
    board = tyro.cli(Board, prog="python -m benchmarks", args=args)
    try:
        return RUN[type(board)](board)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        if os.environ.get("BENCHMARKS_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
