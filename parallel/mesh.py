"""The process grid: one frozen object, handed down; only this file reads the launcher's variables."""

import json
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.torch_version import TorchVersion

from parallel.config import ParallelConfig

SAVE_TIMEOUT = timedelta(hours=2)
"""How long a rank waits for the slowest to write its part of a checkpoint."""


class JoinError(RuntimeError):
    """The processes of the job did not meet."""


@dataclass(frozen=True)
class Axis:
    """One dimension of the process grid, as seen from this rank."""

    name: str
    rank: int
    """This process's place on the axis."""
    ranks: tuple[int, ...]
    """Ranks of the job along the axis, in order."""
    group: dist.ProcessGroup | None = None
    """Of the ranks; None at size 1, where every collective is the identity."""

    @property
    def size(self) -> int:
        """Ranks on the axis."""
        return len(self.ranks)


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


def launched_world_size() -> int:
    """Processes that the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_local_rank() -> int:
    """This process's number on its machine; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def launched_rank() -> int:
    """This process's number in the job; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def launch_name() -> str:
    """Tells this launch from others that run at the same time; the same on all its ranks."""
    if launched_world_size() == 1:
        return f"{socket.gethostname()}:{os.getpid()}"
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def slurm_job() -> str | None:
    """Number of the Slurm job that this process is part of; None outside Slurm."""
    return os.environ.get("SLURM_JOB_ID")


def launcher_grace_s() -> float | None:
    """Seconds that torchrun leaves its ranks after a stop signal; None without it.

    Ranks see what the environment says, not torchrun's option --shutdown-timeout.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    if torch.__version__ < TorchVersion("2.12"):
        return 30.0
    default = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
    return float(os.environ.get("PET_SHUTDOWN_TIMEOUT", default))


def join_job(device_type: str, *, timeout_minutes: float = 10) -> Axis:
    """Join the job's process group (none in one process); the axis of all ranks, for tensors of the host.

    Args:
        device_type: `cpu` (gloo) or `cuda` (gloo and NCCL).

    Raises:
        JoinError: the address is in use or not reachable, a process is missing, or restarts would hang.
    """
    world_size = launched_world_size()
    if world_size > 1 and not dist.is_initialized():
        _refuse_restarts_that_hang()
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        _record_collectives(device_type)
        timeout = timedelta(minutes=timeout_minutes)
        try:
            store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                # One launcher hands ranks that it starts again the store in which the dead ones are listed.
                store = dist.PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
            dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise JoinError(
                f"rank {launched_rank()} of {world_size} did not meet the others at MASTER_ADDR:MASTER_PORT="
                f"{address}: {str(error).splitlines()[0]}; choose a free port of a host in reach of all, "
                "and start all processes"
            ) from error
    group = dist.group.WORLD if world_size > 1 else None
    return Axis("world", launched_rank(), tuple(range(world_size)), group)


def _refuse_restarts_that_hang() -> None:
    """Refuse several launchers that would start ranks again with the store in which the dead are listed.

    They may count their starts differently, so no name for a start is known to all ranks.
    """
    launchers, restarts = (
        os.environ.get(key, "0") for key in ("GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS")
    )
    if int(launchers) > 1 and int(restarts) and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise JoinError(
            f"torchrun --max-restarts={restarts} on {launchers} machines gives ranks that are started again "
            "the store of the dead ones, and they hang; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for every "
            "torchrun, with --rdzv-backend=c10d, or leave --max-restarts out"
        )


def _record_collectives(device_type: str) -> None:
    """Turn torch's flight recorder on, where the user has not said otherwise; NCCL: a dump at a timeout."""
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # the older name
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    if device_type == "cuda":
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def last_collective() -> str:
    """What this process's flight recorders noted last; gloo's has no sends and receives."""
    entries: list[dict[str, Any]] = []
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):  # of gloo, of NCCL where torch has it
        dump = getattr(torch._C._distributed_c10d, name, None)
        entries += [] if dump is None else json.loads(dump(True, False)).get("entries", [])
    if not entries:
        return "none on record"
    last = max(entries, key=lambda entry: entry["time_created_ns"])
    seconds = time.time() - last["time_created_ns"] / 1e9
    is_over = last["retired"] or last["state"] == "completed"
    what = f"{last['profiling_name']} over {last['process_group'][-1]}, shapes {last['input_sizes']}"
    return f"{what}, begun {seconds:.1f} s ago, {'over' if is_over else 'not over'}"


def leave_job() -> None:
    """Leave the process group, if there is one; a process that ends within it may end by SIGABRT."""
    if dist.is_initialized():
        dist.destroy_process_group()


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
        rank=rank,
        world_size=world_size,
        device=device,
        data_mesh=_device_mesh(axes["data"], device_type),
        expert_data_mesh=_device_mesh(axes["edp"], device_type),
        **axes,
    )


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


def set_determinism(on: bool) -> None:
    """Use only algorithms that give the same bits every time (slower); call before CUDA is used."""
    torch.use_deterministic_algorithms(on)
    if on:
        # else every torch.empty is filled
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def refuse_foreign_kernels() -> None:
    """Raise if the distribution `kernels` is installed: it owns the name of our folder."""
    try:
        metadata.distribution("kernels")
    except metadata.PackageNotFoundError:
        return
    raise RuntimeError("package 'kernels' hides this repository's kernels/; pip uninstall kernels")
