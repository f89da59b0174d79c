"""The process grid: what its groups have done before anybody uses them, what determinism costs."""

import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from parallel.config import ParallelConfig
from parallel.launch import set_determinism
from parallel.mesh import init_mesh
from tests.support.dist import run_distributed


def check_first_call(rank: int) -> None:
    """What a barrier would not be: with gloo for the host in the job, it would not reach NCCL."""
    reduced: dict[str, torch.device] = {}
    inner = dist.all_reduce

    def all_reduce(x: torch.Tensor, *, group: dist.ProcessGroup) -> None:
        reduced[str(dist.get_process_group_ranks(group))] = x.device
        inner(x, group=group)

    with mock.patch.object(dist, "all_reduce", all_reduce):
        mesh = init_mesh(ParallelConfig(pp=2, cp=2), "cpu")
    assert reduced == {str(list(axis.ranks)): mesh.device for axis in (mesh.pp, mesh.cp)}


def test_groups_that_send_between_some_ranks_begin_with_all() -> None:
    run_distributed(check_first_call, 4)


def test_determinism_does_not_fill_what_is_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"))
    filled = torch.utils.deterministic.fill_uninitialized_memory
    try:
        set_determinism(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        set_determinism(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled
