"""The program in forked processes: as real as torchrun's, without a second's wait for imports."""

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from tests.train.test_config import composed
from train.config import load_config
from train.pretrain import run_to_end


@dataclass
class Ended:
    """How each rank of a run ended."""

    codes: list[int | None]
    """Exit codes, negative for signals."""
    said: list[str]
    """What each rank wrote."""


def run_forked(
    run_dir: Path,
    *overrides: str,
    processes: int,
    fault: Callable[[int], None] = lambda rank: None,
    timeout_s: float = 90,
) -> Ended:
    """Run the debug configuration in so many processes; `fault(rank)` patches each before it starts."""
    config = composed("conf=debug", f"run_dir={run_dir}", *overrides)
    arguments = (load_config(config), OmegaConf.to_yaml(config, resolve=True))
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            context.Process(target=_enter, args=(rank, processes, folder, fault, arguments))
            for rank in range(processes)
        ]
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + timeout_s
        for rank in ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        for rank in ranks:
            rank.kill()
            rank.join()
        said = [(folder / f"said-{number}").read_text() for number in range(processes)]
    return Ended([rank.exitcode for rank in ranks], said)


def _enter(
    rank: int, processes: int, folder: Path, fault: Callable[[int], None], arguments: tuple[Any, str]
) -> None:
    with (folder / f"said-{rank}").open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(os.getppid())}
    torch.set_num_threads(1)
    code: Any = 1
    try:
        if processes > 1:
            store = f"file://{folder}/store"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
        fault(rank)
        code = run_to_end(*arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
