"""AdamW: which one and why, which parameters decay, and the step against the formula."""

import importlib.util
import logging
import math
import re

import pytest
import torch
from torch import nn

from parallel.config import Offload
from parallel.gradients import Gradients, clip_factor
from parallel.mesh import one_process
from parallel.optimizer import AdamW, Implementation, OptimizerConfig, choose_implementation
from parallel.placement import Shard

alone = one_process(torch.device("cpu")).tp


def make_shards() -> list[Shard]:
    torch.manual_seed(0)
    parameters = {"matrix": nn.Parameter(torch.randn(3, 2)), "norm.weight": nn.Parameter(torch.randn(4))}
    return [
        Shard(name, tuple(p.shape), (0,) * p.dim(), 1, True, p, p.detach()) for name, p in parameters.items()
    ]


def build(shards: list[Shard], cfg: OptimizerConfig) -> AdamW:
    return AdamW(Gradients(shards, alone), cfg)


def test_step_is_adamw_and_norms_do_not_decay(caplog: pytest.LogCaptureFixture) -> None:
    shards = make_shards()
    cfg = OptimizerConfig(lr=1e-2, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.5)
    with caplog.at_level(logging.INFO):
        optimizer = build(shards, cfg)
    assert caplog.messages == ["optimizer: AdamW by torch"]
    assert all(not tensor.any() for tensor in optimizer.moments(shards).values())
    expected = [shard.master.clone() for shard in shards]
    first, second = ([torch.zeros_like(x) for x in expected] for _ in range(2))
    for step in (1, 2):
        optimizer.set_lr(1e-2 * step)
        for i, shard in enumerate(shards):
            shard.master.grad = torch.randn_like(shard.master)
            g, decay = shard.master.grad, 0.5 if shard.name == "matrix" else 0.0
            first[i] = 0.8 * first[i] + 0.2 * g
            second[i] = 0.9 * second[i] + 0.1 * g * g
            update = (first[i] / (1 - 0.8**step)) / ((second[i] / (1 - 0.9**step)).sqrt() + 1e-3)
            expected[i] = expected[i] * (1 - 1e-2 * step * decay) - 1e-2 * step * update
        optimizer.step()
    for shard, value in zip(shards, expected, strict=True):
        torch.testing.assert_close(shard.master, value)
    torch.testing.assert_close(optimizer.moments(shards)["exp_avg.matrix"], first[0])


@pytest.mark.parametrize("max_norm", [0.5, 1000.0])
def test_fused_step_clips_and_publishes_as_separate_passes_do(
    max_norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's optimizer, here through its twin, against torch's; one parameter has a bf16 copy."""
    cfg = OptimizerConfig(lr=1e-2, eps=1e-3, weight_decay=0.5)
    shards, plain = make_shards(), make_shards()
    for mine in (shards, plain):
        mine[0].parameter.data = mine[0].master.bfloat16()
    expected = build(plain, cfg)
    monkeypatch.setattr("parallel.optimizer.choose_implementation", lambda *_, **__: Implementation.kernel)
    fused = build(shards, cfg)
    for optimizer, which in ((fused, shards), (expected, plain)):
        for number, tensor in enumerate(optimizer.moments(which).values(), start=1):
            tensor.fill_(number)
        optimizer.set_step(7)
    for step in range(3):
        for optimizer, which in ((fused, shards), (expected, plain)):
            for shard in which:
                shard.master.grad = torch.full_like(shard.master, 0.3 + step)
            norm = math.sqrt(optimizer.gradients.square_sum().item())
            optimizer.step(clip_factor(norm, max_norm))
    for mine, theirs in zip(shards, plain, strict=True):
        torch.testing.assert_close(mine.master, theirs.master)
        torch.testing.assert_close(mine.parameter, theirs.parameter)
    torch.testing.assert_close(fused.moments(shards), expected.moments(plain))
    assert shards[0].parameter.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("max_grad_norm", 0.0, "must be above 0; inf = no clipping"),
        ("max_grad_norm", float("nan"), "must be above 0; inf = no clipping"),
        ("eps", 0.0, "must be a number above 0"),
        ("eps", float("inf"), "must be a number above 0"),
        ("lr", float("nan"), "must be a number >= 0"),
        ("weight_decay", float("inf"), "must be a number >= 0"),
        ("lr", -1e-4, "must be a number >= 0"),
        ("beta2", 1.0, "must lie in [0, 1)"),
    ],
)
def test_values_that_spoil_the_weights_are_refused(key: str, value: float, rule: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"optimizer.{key}={value} {rule}")):
        OptimizerConfig(**{key: value})


def test_restored_moments_and_step_continue_bitwise() -> None:
    gradients = [[torch.randn(3, 2), torch.randn(4)] for _ in range(4)]

    def run(optimizer: AdamW, shards: list[Shard], steps: range) -> None:
        for step in steps:
            for shard, gradient in zip(shards, gradients[step], strict=True):
                shard.master.grad = gradient.clone()
            optimizer.step()

    shards = make_shards()
    optimizer = build(shards, OptimizerConfig())
    run(optimizer, shards, range(2))
    copies = [shard.master.clone() for shard in shards]
    saved = {key: value.clone() for key, value in optimizer.moments(shards).items()}
    run(optimizer, shards, range(2, 4))

    again = make_shards()
    restored = build(again, OptimizerConfig())
    for shard, copy in zip(again, copies, strict=True):
        shard.master.copy_(copy)
    for key, tensor in restored.moments(again).items():
        tensor.copy_(saved[key])
    restored.set_step(2)
    run(restored, again, range(2, 4))
    assert all(torch.equal(a.master, b.master) for a, b in zip(shards, again, strict=True))


@pytest.mark.parametrize(
    ("given", "on_gpu", "chosen"),
    [
        ({}, True, "kernel"),
        ({}, False, "torch"),
        ({"implementation": Implementation.torch}, True, "torch"),
        ({"implementation": Implementation.torch}, False, "torch"),
        ({"implementation": Implementation.apex}, True, "apex"),
        ({"offload": Offload.cpu}, False, "DeepSpeed's CPU Adam"),
    ],
)
def test_choice(given: dict, on_gpu: bool, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """apex is used where it is asked for, and not because it is there."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert choose_implementation(OptimizerConfig(**given), on_gpu=on_gpu) == chosen


@pytest.mark.parametrize(
    ("asked", "on_gpu", "installed", "reason"),
    [
        ("kernel", False, set(), "optimizer.implementation=kernel needs a GPU; use auto or torch"),
        ("apex", False, {"apex", "amp_C"}, "optimizer.implementation=apex needs a GPU"),
        ("apex", True, set(), "apex is not installed; build it from source, or use auto"),
        ("apex", True, {"apex"}, "apex is installed without its CUDA kernels"),
    ],
)
def test_what_cannot_work_is_refused(
    asked: str, on_gpu: bool, installed: set[str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    with pytest.raises(ValueError, match=reason):
        choose_implementation(OptimizerConfig(implementation=Implementation(asked)), on_gpu=on_gpu)


def test_an_implementation_cannot_be_chosen_for_the_host() -> None:
    with pytest.raises(ValueError, match=r"implementation=torch must be auto with optimizer\.offload=cpu"):
        OptimizerConfig(implementation=Implementation.torch, offload=Offload.cpu)
