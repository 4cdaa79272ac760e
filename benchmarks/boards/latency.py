"""Time of programs against one base, in turns: whatever else the machine does hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import jax
import numpy as np

GROUP = 8  # programs between two runs of the base


def ratios(base: Callable[[], object], calls: Mapping[str, Callable[[], object]], rounds: int, repeat: int = 1):
    """({name: seconds over the base's in the same round and group [rounds]}, the base's seconds [all its rounds]).

    In each round a group of calls and the base run one after the other, in another order each time. A first round, which
    may compile or fetch, does not count. repeat: runs of a call in a row that are timed together.
    """
    names, found, own = list(calls), {}, []
    for start in range(0, len(names), GROUP):
        group = {None: base, **{name: calls[name] for name in names[start : start + GROUP]}}
        order, seconds = list(group), {name: [] for name in group}
        for number in range(rounds + 1):
            for i in np.roll(np.arange(len(order)), number):
                began = time.perf_counter()
                for _ in range(repeat):
                    jax.block_until_ready(group[order[i]]())
                if number:
                    seconds[order[i]].append((time.perf_counter() - began) / repeat)
        at_base = np.array(seconds.pop(None))
        own.append(at_base)
        found |= {name: np.array(times) / at_base for name, times in seconds.items()}
    return found, np.concatenate(own) if own else np.zeros(0)
