"""The summary of the routers' counts, by hand."""

import pytest
import torch

from model.config import ModelConfig, RouterConfig
from model.router import Router
from parallel.mesh import one_process
from train.monitor.expert_counts import ExpertCounts, read_counts


def test_summary_and_record() -> None:
    counts = ExpertCounts(
        load=torch.tensor([[4, 4, 4], [3, 3, 6]]),
        dropped=torch.tensor([[0, 0, 0], [0, 0, 3]]),
        moved=torch.tensor([2, 4]),
        losses=torch.tensor([[1.0, 0.5, 2.0], [3.0, 1.5, 1.0]]),
    )
    assert counts.summary() == {
        "aux_loss": 2.0,
        "z_loss": 1.0,
        "router_entropy": 1.5,
        "drop_rate": 3 / 24,
        "moved_rate": 6 / 24,
        "max_violation": 0.5,
    }
    record = counts.record()
    assert record["max_violation"] == pytest.approx([0, 0.5])
    assert (record["entropy"], record["aux_loss"]) == ([2.0, 1.0], [1.0, 3.0])
    assert (record["load"][1], record["dropped"][1], record["moved"]) == ([3, 3, 6], [0, 0, 3], [2, 4])


def test_reading_starts_the_next_interval() -> None:
    cfg = ModelConfig(
        num_layers=3, hidden_size=4, num_heads=1, num_kv_heads=1, head_dim=4, rotary_dim=2,
        vocab_size=8, num_experts=2, expert_ffn_size=4,
    )  # fmt: skip
    router = Router(cfg, RouterConfig(), layer=1)
    router.load += torch.tensor([3, 5])
    router.moved += 1
    router.losses += 4
    world = one_process(torch.device("cpu")).world
    counts = read_counts([router], [1], 3, 2, world)
    assert counts.load.tolist() == [[0, 0], [3, 5], [0, 0]]
    assert counts.moved.tolist() == [0, 1, 0]
    assert counts.losses[1].tolist() == [2, 2, 2]
    again = read_counts([router], [1], 3, 2, world)
    assert not again.load.any()
    assert not again.moved.any()
