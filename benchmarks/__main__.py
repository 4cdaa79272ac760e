"""python -m benchmarks {demo}: boards of what methods keep and cost; `python -m benchmarks demo --help` lists the flags.

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

from benchmarks.demo import Demo, run  # noqa: E402
from train.loop import INTERRUPTED  # noqa: E402

# The second, hidden member makes tyro ask for a board's name while there is only one.
Board = Annotated[Demo, tyro.conf.subcommand("demo")] | Annotated[None, tyro.conf.Suppress]


def main(args: list[str] | None = None) -> int:
    board = tyro.cli(Board, prog="python -m benchmarks", args=args)
    try:
        return run(board)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        if os.environ.get("BENCHMARKS_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
