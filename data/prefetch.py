"""The next step is prepared by a thread while the current one trains.

Invariant: batches, state and counts are those of the loader alone, without what was only read ahead.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from threading import Thread
from typing import Any

import numpy as np
import torch

from data.loader import Loader, Shape, Step
from data.mixture import Mixture
from data.packing import Batch
from data.planner import Counts


class Prefetcher:
    """Hands out a loader's steps; the loader belongs to it from now on.

    Args:
        plan: the shape and mixture of a step by its number; called from the thread.
        step: number of the first step that is handed out.
        device: where the batches go; memory is pinned for a GPU.
    """

    def __init__(
        self, loader: Loader, plan: Callable[[int], tuple[Shape, Mixture]], *, step: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self._loader, self._plan, self._step, self._device = loader, plan, step, torch.device(device)
        self._state, self._counts = loader.state_dict(), Counts()
        self._skips: Mapping[int, int] = {}
        self._ahead: Future[Step] | None = None
        self._thread: Thread | None = None
        self._wait_seconds = 0.0
        self.documents: list[list[np.ndarray]] = []
        """Those of the last step that was handed out, as in Step."""

    def next_step(self) -> list[Batch]:
        """Return this rank's micro-batches of the next step and begin with the one after it.

        Raises:
            Exception: whatever preparing the step raised, again at each call.
        """
        began = time.perf_counter()
        ahead = self._ahead or self._start()
        step = ahead.result()
        self._wait_seconds += time.perf_counter() - began
        self._state, self._step, self.documents = step.state, self._step + 1, step.documents
        self._counts.add(step.counts)
        self._start()
        return step.batches

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data order after the last step that was handed out."""
        return self._state

    def load_state_dict(
        self, state: dict[str, Any], *, step: int, skips: Mapping[int, int] | None = None
    ) -> None:
        """Go on from a saved place with the step of this number; what was read ahead is dropped.

        Args:
            skips: number -> number: before the first, the data of steps from it to the second are skipped.
        """
        self.close()
        self._skips = skips or {}
        self._loader.load_state_dict(state)
        self._state, self._step = self._loader.state_dict(), step

    def read_counts(self) -> Counts:
        """Return what became of tokens and documents since the last call, over all ranks."""
        counts, self._counts = self._counts, Counts()
        return counts

    def read_wait_seconds(self) -> float:
        """Return how long next_step has waited for data since the last call."""
        waited, self._wait_seconds = self._wait_seconds, 0.0
        return waited

    def close(self) -> None:
        """Wait for the thread and drop what it read."""
        if self._thread is not None:
            self._thread.join()
        self._thread = self._ahead = None

    def _start(self) -> Future[Step]:
        """Prepare step self._step in a thread of its own, which ends with it."""
        self._ahead = Future()
        # A daemon, so that a hanging file system cannot keep a finished process alive.
        self._thread = Thread(
            target=self._prepare, args=(self._ahead, self._step), daemon=True, name="prefetch"
        )
        self._thread.start()
        return self._ahead

    def _prepare(self, ahead: Future[Step], number: int) -> None:
        try:
            for skipped in range(number, self._skips.get(number, number)):
                self._loader.skip(*self._plan(skipped))
            step = self._loader.prepare(*self._plan(number))
            if self._device.type == "cuda":
                # A new thread's device is GPU 0, where pinning would open a context for each rank.
                with torch.cuda.device(self._device):
                    step = step._replace(batches=[batch.pin_memory() for batch in step.batches])
            ahead.set_result(step)
        except BaseException as error:  # it is raised by next_step, in the caller's thread
            ahead.set_exception(error)
