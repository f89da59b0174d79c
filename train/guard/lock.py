"""One job at a time in a run directory.

Invariant: rank 0 holds `RUN_DIR/.lock` by flock until its process ends, so the kernel lets go for a dead one.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import NamedTuple, TextIO

log = logging.getLogger(__name__)

ATTEMPTS, PAUSE_SECONDS = 10, 0.1
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class RunLock(NamedTuple):
    """The outcome of asking for the lock."""

    file: TextIO | None
    """The locked file; closing it lets the lock go. None where the lock was not taken."""
    holder: str | None = None
    """Who else has the lock, for people; None = nobody."""
    error: str | None = None
    """Why the run directory cannot be written; None = it can."""

    def refusal(self, run_dir: Path) -> str | None:
        """Say why no job can start in the directory; None if one can."""
        if self.error:
            return f"run_dir={run_dir} cannot be used: {self.error}; mend that, or give another run_dir"
        if self.holder:
            return f"run_dir={run_dir} is in use by {self.holder}; stop it, or use another run_dir"
        return None


def take_lock(run_dir: Path, launch: str, slurm_job: str | None) -> RunLock:
    """Take the lock unless another job has it; rank 0 calls this before it writes anything else.

    `launch` tells this launch of processes from others.
    """
    try:
        return _take_lock(run_dir, launch, slurm_job)
    except OSError as error:
        return RunLock(None, error=str(error))


def _take_lock(run_dir: Path, launch: str, slurm_job: str | None) -> RunLock:
    run_dir.mkdir(parents=True, exist_ok=True)
    file = (run_dir / ".lock").open("a+", encoding="utf-8")
    for _ in range(ATTEMPTS):  # a rank that asks who holds it has it for a moment
        if _try(file, fcntl.LOCK_EX):
            file.truncate(0)
            facts = {"host": socket.gethostname(), "pid": os.getpid(), "slurm_job": slurm_job}
            text = json.dumps({**facts, "launch": launch}) + "\n"
            os.write(file.fileno(), text.encode())  # a buffer would fail once more when it is closed
            return RunLock(file)
        time.sleep(PAUSE_SECONDS)
    holder = _describe(_read(file))
    file.close()
    return RunLock(None, holder)


def lock_holder(run_dir: Path, launch: str) -> str | None:
    """Tell who else than this launch has the lock, for people; None if nobody has. Any rank may ask."""
    path = run_dir / ".lock"
    if not path.exists():
        return None
    with path.open(encoding="utf-8") as file:
        if _try(file, fcntl.LOCK_SH):
            return None
        facts = _read(file)
    return None if facts.get("launch") == launch else _describe(facts)


def _try(file: TextIO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("%s: this file system has no locks (%s): two jobs may mix here", file.name, error)
    return True


def _read(file: TextIO) -> dict[str, str | int | None]:
    file.seek(0)
    try:
        return json.loads(file.read())
    except ValueError:
        return {}  # its holder is about to write it


def _describe(facts: dict[str, str | int | None]) -> str:
    if not facts:
        return "another job"
    job = f", Slurm job {facts['slurm_job']}" if facts["slurm_job"] else ""
    return f"another job (host {facts['host']}, pid {facts['pid']}{job})"
