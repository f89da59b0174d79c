"""The program in forked processes: as real as torchrun's, without seconds of waiting for imports."""

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config  # what a run imports, so that forks need not
import torch.distributed as dist
from hydra.core.global_hydra import GlobalHydra

from train.pretrain import run_to_end

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(run_to_end.__code__.co_filename)
"""What it imports, forks need not."""


@dataclass
class Ended:
    """How the ranks of a run ended, in their order."""

    codes: list[int | None]
    """Exit codes, negative for signals."""
    out: list[str]
    """What each wrote to its standard output."""
    err: list[str]
    """What each wrote to its standard error."""

    @property
    def said(self) -> list[str]:
        """All that each rank wrote."""
        return [out + err for out, err in zip(self.out, self.err, strict=True)]

    @property
    def stdout(self) -> str:
        """Of all ranks."""
        return "".join(self.out)

    @property
    def stderr(self) -> str:
        """Of all ranks."""
        return "".join(self.err)

    @property
    def returncode(self) -> int | None:
        """The first that is not 0."""
        return next((code for code in self.codes if code), 0)


def launch(
    *arguments: str,
    processes: int = 0,
    cwd: Path = ROOT,
    program: Path = PROGRAM,
    variables: Mapping[str, str] | None = None,
    fault: Callable[[int], None] = lambda rank: None,
    timeout_s: float = 240,
) -> Ended:
    """Run the program as its command line would, on so many ranks with a launcher's variables; 0: without.

    Args:
        program: a script that runs it some other way.
        variables: more of the environment.
        fault: patches each rank before it starts, given its number.
        timeout_s: after which ranks are killed.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def enter(rank: int) -> None:
            _redirect(1, folder / f"out-{rank}")
            _redirect(2, folder / f"err-{rank}")
            launched = _launched(rank, processes, store.port) if processes else {}
            os.environ.update(launched | dict(variables or {}))
            os.chdir(cwd)
            torch.set_num_threads(1)
            os._exit(_run(rank, program, arguments, fault))

        ranks = [context.Process(target=enter, args=(rank,)) for rank in range(max(1, processes))]
        deadline = time.monotonic() + timeout_s
        try:
            for rank in ranks:
                rank.start()
            for rank in ranks:
                rank.join(max(0.0, deadline - time.monotonic()))
        finally:
            for rank in filter(lambda rank: rank.pid, ranks):
                rank.kill()
                rank.join()
        out, err = (
            [(folder / f"{name}-{n}").read_text() for n in range(len(ranks))] for name in ("out", "err")
        )
    return Ended([rank.exitcode for rank in ranks], out, err)


def pretrain(*arguments: str, processes: int = 0, cwd: Path = ROOT) -> str:
    """Run to a good end; what it printed."""
    ended = launch(*arguments, processes=processes, cwd=cwd)
    assert not any(ended.codes), ended.said
    return "".join(ended.said)


def run_forked(
    run_dir: Path,
    *overrides: str,
    processes: int,
    fault: Callable[[int], None] = lambda rank: None,
    timeout_s: float = 90,
) -> Ended:
    """Run the debug configuration in so many processes; `fault(rank)` patches each before it starts."""
    arguments = ("conf=debug", f"run_dir={run_dir}", *overrides)
    return launch(*arguments, processes=processes, fault=fault, timeout_s=timeout_s)


def _redirect(descriptor: int, path: Path) -> None:
    """Standard output or error of this process into a file."""
    stream = (sys.stdout, sys.stderr)[descriptor - 1]
    stream.flush()
    with path.open("w") as file:
        os.dup2(file.fileno(), descriptor)
    setattr(sys, ("stdout", "stderr")[descriptor - 1], os.fdopen(descriptor, "w", closefd=False))


def _launched(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_WORLD_SIZE": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip


def _run(rank: int, program: Path, arguments: tuple[str, ...], fault: Callable[[int], None]) -> int:
    """The exit code of the program in this process."""
    GlobalHydra.instance().clear()
    sys.argv = [str(program), *arguments]
    code: Any = 0
    try:
        fault(rank)
        runpy.run_path(str(program), run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else 1
