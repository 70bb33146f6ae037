"""Times of programs that are compared with each other."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax

Name = TypeVar("Name", bound=Hashable)


def in_turns(calls: Mapping[Name, Callable[[], Any]], rounds: int) -> dict[Name, float]:
    """Return the median seconds of each call. The calls take turns, so that all see the same load of the machine."""
    times: dict[Name, list[float]] = {name: [] for name in calls}
    for n in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            if n:  # the first round compiles
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(own) for name, own in times.items()}
