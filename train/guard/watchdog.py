"""Ends a process that hangs: a thread that, when a section takes too long, prints stacks and exits.

A rank that waits for a stopped peer hangs, too, so any rank can end the job; the launcher sees the exit code.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from parallel.launch import last_collective

HANG_CODE = 75
"""Exit code: trying again makes sense. No sentinel is written; the last checkpoint stays."""


class Watchdog:
    """Watches the section that the main thread is in; one a process, its thread ends with the process."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._changed = threading.Condition()
        self._section, self._deadline = "", float("inf")
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def section(self, name: str, limit_s: float | None) -> Iterator[None]:
        """Allow `limit_s` seconds for what happens in here, None = any time; the section around it pauses."""
        before, start = (self._section, self._deadline), time.monotonic()
        self._enter(name, float("inf") if limit_s is None else start + limit_s)
        try:
            yield
        finally:
            self._enter(before[0], before[1] + time.monotonic() - start)

    def _enter(self, section: str, deadline: float) -> None:
        with self._changed:
            self._section, self._deadline = section, deadline
            self._changed.notify()

    def _watch(self) -> NoReturn:
        with self._changed:
            while True:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    self._end()
                self._changed.wait(min(left, threading.TIMEOUT_MAX))

    def _end(self) -> NoReturn:
        sys.stderr.write(f"rank {self.rank} hangs in {self._section}; stacks of all threads:\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        try:
            sys.stderr.write(f"rank {self.rank}: last collective: {last_collective()}\n")
            sys.stderr.flush()
        finally:
            os._exit(HANG_CODE)
