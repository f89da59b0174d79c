"""What the launcher says, and how a process joins and leaves the job; only this file reads its variables."""

import json
import os
import socket
import time
from datetime import timedelta
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from torch.torch_version import TorchVersion

from parallel.collectives import Axis


class JoinError(RuntimeError):
    """The processes of the job did not meet."""


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
