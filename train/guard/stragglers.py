"""Which rank is slow, and in which section of a step; all others only wait for it.

The main thread says which section of the step it is in. A second thread looks every few milliseconds whether
it computes there, or is in code that communicates, where another rank may be to blame. What is left is the
rank's own time. Of a GPU it sees what the host does, not which device computes slowly.
"""

import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

import torch

from parallel.collectives import all_gather
from parallel.mesh import Mesh

PERIOD_S = 0.005
WAITING = (str(Path(torch.__file__).parent / "distributed"), str(Path(__file__).parents[2] / "parallel"))
"""Folders of the innermost call of a rank that communicates."""
FLOOR = 0.05
"""Part of the time that a rank must lose before it counts: less is noise."""


class Section(StrEnum):
    """A part of a step whose time is compared between ranks."""

    data = "data"
    compute = "forward and backward"
    optimizer = "optimizer"


class Slow(NamedTuple):
    """A rank that keeps others waiting."""

    rank: int
    section: Section
    score: float
    """Median time of the ranks of its pipeline stage in the section / its own time."""


class SectionClock:
    """Measures the own time of the main thread by section; its thread ends with the process."""

    def __init__(self, *, watches: bool) -> None:
        """Start the watching thread, if anybody wants to know."""
        self._main = threading.main_thread().ident
        self._section: Section | None = None
        self._seconds = dict.fromkeys(Section, 0.0)
        self._began = time.monotonic()
        if watches:
            threading.Thread(target=self._watch, name="section clock", daemon=True).start()

    @contextmanager
    def section(self, section: Section) -> Iterator[None]:
        """Count what happens in here for the section."""
        self._section = section
        try:
            yield
        finally:
            self._section = None

    def _watch(self) -> NoReturn:
        last = time.monotonic()
        while True:
            time.sleep(PERIOD_S)
            now, section = time.monotonic(), self._section
            if section is not None and not communicates(sys._current_frames().get(self._main or 0)):
                self._seconds[section] += now - last
            last = now

    def read(self) -> list[float]:
        """Return the seconds since the last call: of each section, and in all."""
        now = time.monotonic()
        found = [*self._seconds.values(), now - self._began]
        self._seconds, self._began = dict.fromkeys(Section, 0.0), now
        return found


def communicates(frame: FrameType | None) -> bool:
    """Tell whether the innermost call of a thread, given by its frame, may wait for another rank."""
    return frame is None or frame.f_code.co_filename.startswith(WAITING)


def gather_times(seconds: Sequence[float], mesh: Mesh) -> list[list[float]]:
    """Gather what `SectionClock.read` gave on every rank, in the order of ranks, on all ranks."""
    return all_gather(torch.tensor([seconds], dtype=torch.float64), mesh.world).tolist()


def find_slow(times: Sequence[Sequence[float]], *, stages: int, limit: float) -> list[Slow]:
    """Find the ranks and sections with a score below the limit, the worst first.

    Args:
        times: [ranks][sections and all], from `gather_times`; ranks of a pipeline stage follow each other.
        stages: number of pipeline stages.
        limit: highest score that is reported, above 0 and below 1.
    """
    size, found = len(times) // stages, []
    for first in range(0, len(times), size):
        for number, section in enumerate(Section):
            own = [rank[number] for rank in times[first : first + size]]
            median = statistics.median_low(own)
            for rank, seconds in enumerate(own, start=first):
                if seconds - median > FLOOR * times[rank][-1] and median < limit * seconds:
                    found.append(Slow(rank, section, median / seconds))
    return sorted(found, key=lambda slow: slow.score)
