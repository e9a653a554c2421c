"""Fair timing of two ways to do the same work: interleaved rounds in one process, CPU time, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rounds:
    """Seconds of each way, round by round.

    Attributes:
        seconds: CPU seconds of the process (all threads) by name, one number per round.
        wall_seconds: elapsed seconds, in the same form.
    """

    seconds: dict[str, list[float]]
    wall_seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Median CPU seconds of one way."""
        return statistics.median(self.seconds[name])

    def median_wall(self, name: str) -> float:
        """Median elapsed seconds of one way."""
        return statistics.median(self.wall_seconds[name])

    def ratio(self, peer: str = "peer", ours: str = "ours") -> float:
        """How many times more CPU time the peer takes; NaN where nothing was measured."""
        return self.median(peer) / self.median(ours) if self.median(ours) > 0 else float("nan")


def interleaved(rounds: int, ways: Mapping[str, Callable[[], Any]]) -> Rounds:
    """Run every way once per round, in turn, so that a busy moment of the machine falls on all of them.

    One round that is not counted goes first (caches of files, first imports), and every second round runs in the
    opposite order.

    Args:
        rounds: rounds that count.
        ways: what to run, by name.
    """
    if rounds < 1:
        raise ValueError(f"rounds: {rounds}, but at least 1 is needed")
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        order = list(ways) if number % 2 == 0 else list(reversed(list(ways)))
        for name in order:
            started, started_wall = time.process_time(), time.perf_counter()
            ways[name]()
            if number:
                cpu[name].append(time.process_time() - started)
                wall[name].append(time.perf_counter() - started_wall)
    return Rounds(cpu, wall)
