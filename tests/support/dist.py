"""Real process groups for tests: gloo on one machine, by fork, meeting in a file."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_distributed(worker: Callable, world_size: int, *args) -> None:
    """Run worker(rank, *args) in world_size processes of one group; re-raise the first failure."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _enter, (worker, world_size, Path(folder) / "store", args), nprocs=world_size, start_method="fork"
        )


def _enter(rank: int, worker: Callable, world_size: int, store: Path, args: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    worker(rank, *args)
    dist.barrier()
    dist.destroy_process_group()
