"""The process grid: one frozen object, handed down."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from parallel.collectives import Axis
from parallel.config import ParallelConfig
from parallel.launch import (
    join_job,
    launched_local_rank,
    launched_rank,
    launched_world_size,
    refuse_foreign_kernels,
)

SAVE_TIMEOUT = timedelta(hours=2)
"""How long a rank waits for the slowest to write its part of a checkpoint."""


@dataclass(frozen=True)
class Mesh:
    """The dense grid (pp, dp, cp, tp) and the expert grid (pp, edp, ep, etp) over the same ranks."""

    rank: int
    """Of the whole job."""
    world_size: int
    """Processes of the job."""
    device: torch.device
    """Where this rank computes."""
    pp: Axis
    dp: Axis
    cp: Axis
    tp: Axis
    edp: Axis
    ep: Axis
    etp: Axis
    data: Axis
    """dp x cp: dense parameters are replicated over it."""
    stage: Axis
    """dp x cp x tp = edp x ep x etp: the ranks that share a pipeline stage, and the router's pool."""
    exchange: Axis
    """ep of the EP groups that share a capacity: choices travel along it. Without a capacity: ep."""
    exchange_back: Axis
    """The same ranks, by another process group if exchanges overlap."""
    etp_back: Axis
    """As etp; see above."""
    world: Axis
    """All ranks."""
    saving: Axis
    """All ranks, for tensors of the host; a process group of its own, because saves are slow and run beside
    training."""
    data_mesh: DeviceMesh | None = None
    """`data` for FSDP2; None at size 1."""
    expert_data_mesh: DeviceMesh | None = None
    """`edp` for FSDP2; None at size 1."""


def init_mesh(cfg: ParallelConfig, device_type: str, *, pool_groups: int = 1, overlaps: bool = False) -> Mesh:
    """Join the job, unless done, and lay both grids over it.

    Args:
        device_type: `cpu` (gloo) or `cuda` (NCCL).
        pool_groups: EP groups between which choices may move; divides edp.
        overlaps: give the way back from the experts process groups of its own, because one process group
            runs its operations one after the other.

    Raises:
        RuntimeError: PyPI's package `kernels` would hide ours.
        ValueError: the degrees do not fit the world size.
    """
    refuse_foreign_kernels()
    world_size, rank = launched_world_size(), launched_rank()
    dp, edp = cfg.dp(world_size), cfg.edp(world_size)
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", launched_local_rank())
        torch.cuda.set_device(device)
    join_job(device_type)
    dense = torch.arange(world_size).view(cfg.pp, dp, cfg.cp, cfg.tp)
    expert = torch.arange(world_size).view(cfg.pp, edp, cfg.ep, cfg.etp)
    grids = {
        "pp": dense.flatten(1).T,
        "dp": dense.movedim(1, -1).flatten(0, -2),
        "cp": dense.movedim(2, -1).flatten(0, -2),
        "tp": dense.flatten(0, -2),
        "edp": expert.movedim(1, -1).flatten(0, -2),
        "ep": expert.movedim(2, -1).flatten(0, -2),
        "etp": expert.flatten(0, -2),
        "exchange": expert.view(-1, pool_groups * cfg.ep, cfg.etp).movedim(1, -1).flatten(0, -2),
        "data": dense.flatten(1, 2).movedim(1, -1).flatten(0, -2),
        "stage": dense.flatten(1),
        "world": dense.view(1, -1),
    }
    groups: dict[str, dist.ProcessGroup] = {}
    axes: dict[str, Any] = {name: _axis(name, lines.tolist(), rank, groups) for name, lines in grids.items()}
    for name in ("pp", "cp"):
        _meet(axes[name], device)
    own: dict[str, dist.ProcessGroup] = {} if overlaps else groups
    for name in ("exchange", "etp"):
        axes[f"{name}_back"] = _axis(f"{name}_back", grids[name].tolist(), rank, own)
    axes["saving"] = _axis(
        "saving", [list(range(world_size))], rank, {}, backend="gloo", timeout=SAVE_TIMEOUT
    )
    return Mesh(
        rank=rank, world_size=world_size, device=device, data_mesh=_device_mesh(axes["data"], device_type),
        expert_data_mesh=_device_mesh(axes["edp"], device_type), **axes,
    )  # fmt: skip


def one_process(device: torch.device) -> Mesh:
    """The mesh of a process that runs alone, whatever the launcher's variables say."""
    names = ("pp", "dp", "cp", "tp", "edp", "ep", "etp", "data", "stage", "exchange", "world", "saving")
    axes: dict[str, Any] = {name: Axis(name, 0, (0,)) for name in (*names, "exchange_back", "etp_back")}
    return Mesh(rank=0, world_size=1, device=device, **axes)


def _axis(
    name: str, lines: list[list[int]], rank: int, groups: dict[str, dist.ProcessGroup], **options: Any
) -> Axis:
    """This rank's line of an axis; equal sets of lines share their process groups.

    Args:
        options: of new groups, if not the job's.
    """
    mine = next(line for line in lines if rank in line)
    if len(mine) == 1:
        return Axis(name, 0, tuple(mine))
    key = str(lines)
    if key not in groups:
        groups[key], _ = dist.new_subgroups_by_enumeration(lines, group_desc=name, **options)
    return Axis(name, mine.index(rank), tuple(mine), groups[key])


def _meet(axis: Axis, device: torch.device) -> None:
    """One collective of all ranks on their device (a barrier would go to gloo).

    As a group's first call, NCCL leaves undefined what sends between only some of the ranks do.
    """
    if axis.group is not None:
        dist.all_reduce(torch.zeros(1, device=device), group=axis.group)


def _device_mesh(axis: Axis, device_type: str) -> DeviceMesh | None:
    if axis.group is None:
        return None
    return DeviceMesh.from_group(axis.group, device_type, mesh_dim_names=(axis.name,))
