"""The process grid: one frozen object, handed down; only this file reads the launcher's variables."""

import os
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.config import ParallelConfig


@dataclass(frozen=True)
class Mesh:
    """This process's place among all."""

    rank: int
    """Of the whole job."""
    world_size: int
    """Processes of the job."""
    device: torch.device
    """Where this rank computes."""
    dp: DeviceMesh | None
    """Data-parallel axis; None in one process."""

    @property
    def dp_rank(self) -> int:
        """Place on the data-parallel axis."""
        return self.dp.get_local_rank() if self.dp else 0

    @property
    def dp_size(self) -> int:
        """Ranks on the data-parallel axis."""
        return self.dp.size() if self.dp else 1


def launched_world_size() -> int:
    """Processes that the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_local_rank() -> int:
    """This process's number on its machine; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def launched_rank() -> int:
    """This process's number in the job; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def init_mesh(cfg: ParallelConfig, device_type: str, *, timeout_minutes: float = 10) -> Mesh:
    """Join the job's process group (none in one process) and lay the axes over it.

    Args:
        device_type: `cpu` (gloo) or `cuda` (NCCL).

    Raises:
        RuntimeError: PyPI's package `kernels` would hide ours.
        ValueError: the degrees do not fit the world size.
    """
    refuse_foreign_kernels()
    world_size = launched_world_size()
    dp = cfg.dp(world_size)
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", launched_local_rank())
        torch.cuda.set_device(device)
    if world_size == 1:
        return Mesh(rank=0, world_size=1, device=device, dp=None)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    return Mesh(
        rank=dist.get_rank(),
        world_size=world_size,
        device=device,
        dp=init_device_mesh(device_type, (dp,), mesh_dim_names=("dp",)),
    )


def close_mesh(mesh: Mesh) -> None:
    """Leave the process group."""
    if mesh.world_size > 1:
        dist.destroy_process_group()


def set_determinism(on: bool) -> None:
    """Use only algorithms that give the same bits every time (slower); call before CUDA is used."""
    torch.use_deterministic_algorithms(on)
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def refuse_foreign_kernels() -> None:
    """Raise if the distribution `kernels` is installed: it owns the name of our folder."""
    try:
        metadata.distribution("kernels")
    except metadata.PackageNotFoundError:
        return
    raise RuntimeError("package 'kernels' hides this repository's kernels/; pip uninstall kernels")
