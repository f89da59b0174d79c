"""How a run is asked to stop, and the file that says how it ended.

A signal only sets a flag; the ranks agree on it at the end of a step, so all of them save the same one, and
before the first, where there is nothing to save.
"""

import json
import logging
import signal
from enum import StrEnum
from pathlib import Path
from types import FrameType

import torch

from parallel.collectives import Axis, all_reduce_sum

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Ending(StrEnum):
    """How a run ended; also the name of the sentinel file."""

    DONE = "DONE"
    REQUEUE = "REQUEUE"
    FAILED = "FAILED"


class StoppedEarly(Exception):
    """The run was asked to stop before its first step; the text says by what. There is nothing to save."""


EXIT_CODES = {Ending.DONE: 0, Ending.REQUEUE: 75, Ending.FAILED: 1}


class StopRequest:
    """Set by the first SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 (Slurm's warning); later ones change nothing."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def install(self) -> "StopRequest":
        """Take over the stop signals of this process."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name

    @property
    def is_set(self) -> bool:
        """Tell whether this rank was asked to stop."""
        return self.signal_name is not None

    def leave_early(self, world: Axis, when: str) -> None:
        """Stop on every rank if one was asked to, before the first step.

        Raises:
            StoppedEarly: on every rank, if one was asked to stop.
        """
        if int(all_reduce_sum(torch.tensor(int(self.is_set)), world)):
            raise StoppedEarly(f"{self.signal_name or 'another rank was asked to stop'} {when}")


def write_sentinel(run_dir: Path, ending: Ending, *, code: int, step: int | None, reason: str) -> None:
    """Say in the run directory how the run ended; replaces what an earlier start said.

    A disk that does not take it changes neither the ending nor the code.
    """
    text = json.dumps({"code": code, "step": step, "reason": reason})
    try:
        clear_sentinels(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / ending).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        log.error("%s: not written: %s; it would say %s", run_dir / ending, error.strerror, text)


def clear_sentinels(run_dir: Path) -> None:
    """Forget how an earlier start ended."""
    for ending in Ending:
        (run_dir / ending).unlink(missing_ok=True)
