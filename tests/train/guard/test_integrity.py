"""Bits that change in memory: every flip is seen, rank and tensor are named, nothing is saved."""

import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from parallel.config import ParallelConfig
from parallel.mesh import Mesh, init_mesh
from parallel.pipeline import SingleStage
from tests.support.configs import config
from tests.support.dist import run_distributed
from tests.support.forked import run_forked
from tests.support.layout_cases import TINY, Case, alone, build
from tests.support.runs import column, ending, lines, tensors
from train.config import ConfigError
from train.guard.integrity import DamagedStateError, StateGuard, digests
from train.guard.spikes import Health, HealthConfig


def flip(tensor: torch.Tensor) -> None:
    """A bit of the mantissa of an element in the middle."""
    flat = tensor.detach().view(-1).view(torch.int32)
    flat[len(flat) // 2] ^= 1 << 3


def flip_at_rest(name: str, step: int, on_rank: int, rank: int) -> None:
    """A fault for run_forked: a bit flips after the update of the step, and after its hash if it has one."""
    inner = StateGuard.remember

    def remember(self: StateGuard, updates: int, number: int, *, saves: bool) -> None:
        inner(self, updates, number, saves=saves)
        if (number, rank) == (step, on_rank):
            flip(self._state()[name])

    StateGuard.remember = remember  # type: ignore[method-assign]


@pytest.mark.parametrize("make", [
    lambda: torch.randn(7, 9),
    lambda: torch.randn(101)[1:],  # begins within a word
    lambda: torch.randn(4 * 64 + 3),  # blocks
    lambda: torch.randn(4 * 64 + 9)[1:],
    lambda: torch.randn(1),
    lambda: torch.randn(5).double(),
    lambda: torch.arange(64 + 10),
])  # fmt: skip
def test_any_flipped_bit_changes_the_hash(
    make: Callable[[], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.guard.integrity.WORDS", 64)
    torch.manual_seed(0)
    x = make()
    (before,) = digests([x])
    assert digests([x.clone()]).tolist() == [before]
    assert digests([torch.ones(3), x])[1] == before
    words = x.view(-1).view(torch.int32)
    for place in range(len(words)):
        for bit in (0, 13, 22, 31):
            words[place] ^= -(1 << 31) if bit == 31 else 1 << bit
            assert digests([x])[0] != before, (place, bit)
            words[place] ^= -(1 << 31) if bit == 31 else 1 << bit
    assert digests([x])[0] == before


def test_swapped_elements_and_signs_of_zero_change_the_hash() -> None:
    x = torch.zeros(4)
    for other in (torch.tensor([-0.0, 0, 0, 0]), torch.tensor([1e-45, 0, 0, 0])):
        assert digests([x]) != digests([other])
    ab, ba = torch.arange(12.0), torch.arange(12.0)
    ba[[2, 9]] = ab[[9, 2]]
    assert digests([ab]) != digests([ba])
    assert digests([ab[:0], ab]).shape == (2,)


def test_swapped_words_and_blocks_change_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks share their factors, so their order counts; so does that of words and of odd elements."""
    monkeypatch.setattr("train.guard.integrity.WORDS", 4)
    x = torch.arange(25.0)
    for one, other in ((0, 2), (0, 8), (8, 16), (23, 24)):
        y = x.clone()
        y[[one, other]] = x[[other, one]]
        assert digests([x]) != digests([y]), (one, other)
    monkeypatch.setattr("train.guard.integrity.WORDS", 8)
    words = torch.arange(8)
    changes = torch.tensor([1, 0, -2, 0, 1, 0, 0, 0])  # cancel where factors grow evenly
    assert digests([words]) != digests([words + changes])


def guarded(every: int | None, mesh: Mesh | None = None, tp: int = 1) -> tuple[StateGuard, torch.Tensor]:
    """The guard of a small model, and one of its router biases."""
    case = Case(parallel=ParallelConfig(tp=tp), dp=1, model=TINY, row_tokens=16, micro_rows=1, num_micro=1)
    built, bias = build(case, mesh or alone()), torch.zeros(4)
    biases = {"router.bias.0": bias}
    return StateGuard(built.shards, built.optimizer, biases, built.mesh, every=every), bias


def check_parts(rank: int) -> None:
    """Rank 1's bias differs after it has been found to be well."""
    guard, bias = guarded(1, init_mesh(ParallelConfig(tp=2), "cpu"), tp=2)
    guard.remember(1, 1, saves=False)
    guard.check(1)
    if rank == 1:
        flip(bias)
    guard.remember(2, 2, saves=False)
    with pytest.raises(DamagedStateError, match=r"tp ranks \[0, 1\] hold different bits: router\.bias\.0\."):
        guard.check(2)


def test_parts_that_tp_ranks_hold_of_a_tensor_are_no_replicas() -> None:
    """They differ in a healthy run; router biases are alike."""
    run_distributed(check_parts, 2)


def test_what_is_remembered_stays_until_an_update() -> None:
    """A skipped step changes nothing, so its hash must not replace the one from before a flip."""
    guard, bias = guarded(every=1)
    guard.remember(1, 1, saves=False)
    flip(bias)
    guard.remember(1, 2, saves=False)
    assert guard.damage(1) == 1
    with pytest.raises(DamagedStateError, match=r"router\.bias\.0 changed between two updates"):
        guard.check(1)
    assert guard.damage(2) == 0, "what was remembered is from before the second update"
    guard.remember(2, 3, saves=False)
    assert guard.damage(2) == 0
    guard.check(2)


def test_steps_that_are_saved_are_hashed_out_of_turn() -> None:
    guard, bias = guarded(every=10)
    for step, saves in ((1, False), (2, True), (10, False)):
        guard.remember(step, step, saves=saves)
        flip(bias)
        assert guard.damage(step) == (step > 1)
    never, bias = guarded(every=None)
    never.remember(10, 10, saves=True)
    flip(bias)
    assert never.damage(10) == 0


@pytest.mark.parametrize(
    ("name", "saves"),
    [("model.blocks.1.moe.experts.down", True), ("exp_avg_sq.blocks.0.mixer.qkv.weight", False)],
    ids=["a unique shard, before a save", "a moment, before an update"],
)
def test_a_flip_at_rest_is_named_and_not_saved(
    name: str, saves: bool, license_corpus: Path, tmp_path: Path
) -> None:
    overrides = [f"data.sources=[{{path: {license_corpus}}}]", "train.steps=4", "parallel.zero_stage=3"]
    overrides += ["checkpoint.keep=null", f"checkpoint.every={1 if saves else 2}"]
    step = 3
    run_dir, clean = tmp_path / "run", tmp_path / "clean"
    hashed = [*overrides, "health.hash_every=1"]
    ended = run_forked(run_dir, *hashed, processes=2, fault=partial(flip_at_rest, name, step, 1))
    assert ended.codes == [75, 75], ended.said
    kind, facts = ending(run_dir)
    assert (kind, facts["code"], facts["step"]) == ("REQUEUE", 75, step)
    named = f"rank 1 on {platform.node()}: {name} changed between two updates"
    assert named in facts["reason"]
    assert facts["reason"].count(" changed ") == 1
    assert named in ended.said[1]
    assert "step 3: silent corruption" in ended.said[0]
    assert sorted(path.name for path in (run_dir / "checkpoints").glob("[!.]*")) == (
        ["step-1", "step-2"] if saves else ["step-2"]
    )
    assert [record["step"] for record in lines(run_dir)] == [1, 2, 3]
    if not saves:
        return
    for where in (run_dir, clean):  # on from the good one; and as if nothing had happened, hashed or not
        assert run_forked(where, *overrides, processes=2).codes == [0, 0]
    assert column(run_dir, "loss").tolist() == column(clean, "loss").tolist()
    first, second = (tensors(each / "checkpoints/step-4") for each in (run_dir, clean))
    assert all(np.array_equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("tp", "found"),
    [
        (2, "tp ranks [0, 1] hold different bits: model.blocks.2.mixer_norm.weight"),
        (4, "tp ranks [0, 1, 2, 3] hold different bits, rank 1 the odd one out: model.blocks.2."),
    ],
)
def test_replicas_over_tp_that_part_are_named(
    tp: int, found: str, license_corpus: Path, tmp_path: Path
) -> None:
    """The flip comes before a step that is not hashed: the hash at rest cannot know."""
    ended = run_forked(
        tmp_path, f"data.sources=[{{path: {license_corpus}}}]", "train.steps=4", f"parallel.tp={tp}",
        "health.hash_every=2", processes=tp,
        fault=partial(flip_at_rest, "model.blocks.2.mixer_norm.weight", 1, 1),
    )  # fmt: skip
    assert ended.codes == [75] * tp, ended.said
    kind, facts = ending(tmp_path)
    assert (kind, facts["step"]) == ("REQUEUE", 2)
    assert found in facts["reason"]
    assert not list(tmp_path.glob("checkpoints/step-*"))


def test_hash_every_is_checked() -> None:
    with pytest.raises(ValueError, match=r"health.hash_every=0 must be at least 1, or null = never"):
        HealthConfig(hash_every=0)


def perturb_gradient(calls: list[int], factor: float, on_rank: int, rank: int) -> None:
    """A fault for run_forked: in these calls, counted from 1, one gradient element of one rank is off."""
    inner, count = SingleStage.forward_backward, [0]

    def forward_backward(self: SingleStage, *arguments: object) -> torch.Tensor:
        loss = inner(self, *arguments)  # type: ignore[arg-type]
        count[0] += 1
        if count[0] in calls and rank == on_rank:
            gradient = dict(self.model.named_parameters())["blocks.1.mixer.qkv.weight"].grad
            gradient.to_local()[0, 0] = factor  # type: ignore[union-attr]
        return loss

    SingleStage.forward_backward = forward_backward  # type: ignore[method-assign]


@pytest.mark.parametrize("is_transient", [True, False])
def test_a_suspicious_step_is_computed_again(
    is_transient: bool, license_corpus: Path, tmp_path: Path
) -> None:
    """Step 3's gradient is off, as a spike in the first of two passes or as NaN in both."""
    overrides = [
        f"data.sources=[{{path: {license_corpus}}}]", "train.steps=4", "health.window=4",
        "checkpoint.every=2", "router.balancing=bias", "router.capacity_factor=1.0", "health.spike_sigmas=30",
    ]  # fmt: skip
    fault = partial(perturb_gradient, [3] if is_transient else [3, 4], 1e3 if is_transient else np.nan, 1)
    run_dir, clean = tmp_path / "run", tmp_path / "clean"
    ended = run_forked(run_dir, *overrides, "health.rerun=on_suspicion", processes=2, fault=fault)
    assert ended.codes == [0, 0], ended.said
    where = (
        f"step 3: rank 1 on {platform.node()} computed other bits of gradient of blocks.1.mixer.qkv.weight"
    )
    if not is_transient:
        assert "step 3: computed again with the same bits: no transient error" in ended.said[0]
        assert "other bits" not in "".join(ended.said)
        assert [record["skipped"] for record in lines(run_dir)] == [0, 0, 1, 0]
        return
    assert where in ended.said[1]
    assert "other bits" not in ended.said[0].replace("ranks got other bits", "")
    assert "step 3: computed again, 1 ranks got other bits: a transient error" in ended.said[0]
    assert [record["skipped"] for record in lines(run_dir)] == [0, 0, 0, 0]
    assert run_forked(clean, *overrides, processes=2).codes == [0, 0]  # and counts, drops, bias as there
    for key in ("loss", "grad_norm", "aux_loss", "drop_rate"):
        assert column(run_dir, key).tolist() == column(clean, key).tolist()
    assert lines(run_dir, "experts") == lines(clean, "experts")
    first, second = (tensors(each / "checkpoints/step-4") for each in (run_dir, clean))
    assert all(np.array_equal(first[key], second[key]) for key in first)


def test_rerun_needs_a_device_that_repeats_bits() -> None:
    arguments = ("conf=debug", "health.rerun=on_suspicion", "train.deterministic=false")
    config(*arguments, "train.device=cpu").validate(1)
    with pytest.raises(
        ConfigError, match=r"health\.rerun=on_suspicion compares bits, which a GPU repeats only"
    ):
        config(*arguments, "train.device=auto").validate(1)


def test_suspicion_is_what_the_policy_calls_a_spike() -> None:
    health = Health(HealthConfig(window=4))
    assert not health.suspects(1e9, 1e9)
    assert health.suspects(1.0, float("inf"))
    for loss in (1.0, 1.1, 1.0):
        health.judge(loss, 1.0)
    before = health.state_dict()
    assert health.suspects(9.0, 1.0)
    assert health.suspects(1.0, 2.0)
    assert not health.suspects(1.05, 1.0)
    assert health.state_dict() == before
