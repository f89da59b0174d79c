"""The layout contract on named layouts: losses, gradients, updates and checkpoints against one process."""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from math import lcm, prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig, RouterConfig
from parallel.config import ParallelConfig, Schedule
from parallel.mesh import init_mesh
from parallel.optimizer import AdamW, OptimizerConfig
from tests.support.dist import run_distributed
from tests.support.layout_cases import (
    Built,
    Case,
    Reference,
    alone,
    box_of,
    build,
    differences,
    explain_failures,
    run_cases,
    settled,
)
from train.checkpoint.contents import own_boxes
from train.checkpoint.manifest import read_manifest
from train.checkpoint.resume import load_checkpoint
from train.checkpoint.saving import write_together
from train.config import ConfigError

# Sizes that divide by few axes: local parts of FSDP2 are uneven, some empty.
MODEL = ModelConfig(
    num_layers=5,
    hidden_size=24,
    num_heads=12,
    num_kv_heads=2,
    head_dim=6,
    rotary_dim=4,
    vocab_size=60,
    num_experts=12,
    expert_ffn_size=24,
    softmax_every=2,
)
ONE_AXIS = """
dp2, dp3, dp4, dp2 zero2, dp3 zero2, dp4 zero3, dp2 zero3
tp2, tp3 kv3, tp4, tp4 kv1
cp2, cp3, cp4
pp2, pp3, pp4, pp2 interleaved, pp2 interleaved_zero_bubble, pp2 zbv, pp2 dualpipev
dp2 ep2, dp3 ep3, dp4 ep4, tp2 ep2, cp3 ep3, cp4 ep4
dp2 etp2, dp3 etp3, dp4 etp4, tp2 etp2, cp3 etp3, tp4 etp4
"""
"""Each dimension at 2, 3 and 4; ep and etp fold another one's ranks."""
MIXED = """
pp2 cp2 tp2 ep4, dp2 cp2 ep2 etp2, dp2 tp2 ep4, pp2 dp4 ep2 etp2 zero3
tp4 ep2 etp2, tp2 dp2 zero3, tp2 cp2 ep2 zero2, cp2 dp2 etp2, tp2 cp2 dp2 ep2 etp2 zero3, tp2 cp2 dp2 zero2
tp2 dp2 cp2 ep8 x24, tp2 dp4 etp2 zero3, cp3 tp2 ep2 etp3, dp3 tp2 ep3 zero3, cp4 dp2 ep4 zero2
pp2 tp2, pp2 dp2 zero3, pp2 dp2 zero2 interleaved, pp2 tp2 ep2 interleaved_zero_bubble
pp2 cp2 zero2 interleaved_zero_bubble, pp2 dp2 ep2 zbv, pp2 dp2 dualpipev, pp2 cp2 tp2 ep2 etp2
pp4 dp2 ep2, pp4 tp2 etp2, pp3 cp2 ep2, pp2 dp3 ep3 zero3, pp2 dp2 tp2 etp4 zero2 interleaved
pp2 dp2 cp2 ep4 zbv, pp2 cp2 tp2 ep2 dualpipev zero2, pp2 cp4 ep2 etp2 interleaved zero3
"""


def parse(text: str) -> Case:
    """`pp2 dp2 zero3 interleaved kv3 x24` -> a case; kv: key-value heads, x: experts.

    What pipelines need, stages of their own layers and micro-batches to fill them, would only repeat itself
    without one: three layers have every neighbour that five have, and of two micro-batches one is the last.
    """
    given: dict[str, Any] = {"schedule": Schedule["1f1b"], "zero": 1, "dp": 1, "kv": 2, "x": 12}
    for word in text.split():
        match = re.fullmatch(r"(pp|dp|cp|tp|ep|etp|zero|kv|x)(\d+)", word)
        given |= {match[1]: int(match[2])} if match else {"schedule": Schedule(word)}
    dp = given.pop("dp")
    layers, micro = (5, 4) if given.get("pp", 1) > 1 else (3, 2)
    model = replace(MODEL, num_layers=layers, num_kv_heads=given.pop("kv"), num_experts=given.pop("x"))
    cfg = ParallelConfig(zero_stage=given.pop("zero"), **given)
    rows = 3 if dp == 3 else 4
    return Case(
        parallel=cfg, dp=dp, model=model, row_tokens=24, micro_rows=rows // dp, num_micro=micro, pieces=24
    )


DROPPING = RouterConfig(capacity_factor=0.9, aux_loss_coefficient=0.1, z_loss_coefficient=0.01)
LAYOUTS = [text.strip() for text in re.split(r"[,\n]", ONE_AXIS) if text.strip()]
CASES = {text: parse(text) for text in LAYOUTS}
MIXED_LAYOUTS = [text.strip() for text in re.split(r"[,\n]", MIXED) if text.strip()]
CASES |= {
    text: replace(parse(text), router=DROPPING, overlap_groups=2 - (number % 3 > 0))
    for number, text in enumerate(MIXED_LAYOUTS)
}
TRUTHS: dict[str, tuple[Case, Reference]] = {}
"""By what one process sees of a case."""


def with_truth(case: Case) -> tuple[Case, Reference]:
    """The case without near ties, and what one process finds."""
    key = f"{case.num_micro} x {case.rows} rows of {case.model}, {case.router}"
    if key not in TRUTHS:
        TRUTHS[key] = settled(case)
    twin, truth = TRUTHS[key]
    return replace(case, seed=twin.seed), truth


@pytest.mark.timeout(0)  # the harness ends cases that hang
@pytest.mark.parametrize("world", sorted({case.world_size for case in CASES.values()}))
def test_losses_gradients_and_updates(world: int) -> None:
    """Three optimizer steps of every layout of this world size, in one start of its processes."""
    drawn = {text: with_truth(case) for text, case in CASES.items() if case.world_size == world}
    for case, _ in drawn.values():
        case.run_config().validate(world)
    cases = list(drawn.values())
    outcome = run_cases(world, list(drawn), lambda number: differences(*cases[number]))
    assert not outcome.failures, explain_failures(outcome)


def compare_bf16(rank: int, text: str) -> None:
    """All forms keep fp32 masters, compute in bf16 and add up gradients in fp32."""
    case = parse(text)
    mesh = init_mesh(case.parallel, "cpu")
    whole, parts = (build(case, place, dtype=torch.bfloat16) for place in (alone(), mesh))
    gates = {shard.name for shard in whole.shards if shard.parameter.dtype == torch.float32}
    assert gates == {f"blocks.{layer}.moe.router.gate.weight" for layer in range(case.model.num_layers)}
    (expected, _), (actual, squares) = whole.backward(case, 0), parts.backward(case, 0)
    assert abs(actual / expected - 1) < 2e-3
    assert all(shard.master.grad.dtype == torch.float32 for shard in whole.shards + parts.shards)
    assert squares == pytest.approx(whole.gradients.square_sum().item(), rel=5e-2)
    optimizer = AdamW(whole.gradients, OptimizerConfig(lr=1e-5))
    before = [shard.master.clone() for shard in whole.shards]
    optimizer.step()
    for old, shard in zip(before, whole.shards, strict=True):
        assert not torch.equal(old, shard.master)  # a step far below bf16's resolution is kept
        assert torch.equal(shard.parameter, shard.master.to(shard.parameter.dtype))


@pytest.mark.parametrize("layout", ["dp2", "tp2", "dp2 ep2"])
def test_bf16_with_fp32_masters(layout: str) -> None:
    run_distributed(compare_bf16, 2, layout)


SAVED_AT = 2
"""Steps before a checkpoint: after one, both moments would say the same."""


def saved_in(folder: Path) -> Path:
    """The checkpoint that a case has written below its folder."""
    return folder / f"checkpoints/step-{SAVED_AT}"


def state(built: Built) -> dict[str, Tensor]:
    """Weights and both moments that this rank holds."""
    weights = {f"model.{shard.name}": shard.master for shard in built.shards}
    return weights | built.optimizer.moments(built.shards)


def unequal(mine: Built, full: dict[str, Tensor]) -> list[str]:
    """Tensors whose bits are not those of the full ones."""
    boxes = {shard.name: box_of(shard) for shard in mine.shards}
    held = state(mine).items()
    return [key for key, part in held if not torch.equal(part, full[key][boxes[key.partition(".")[2]]])]


def load(path: Path, built: Built) -> Built:
    """The model as it was saved."""
    manifest, where = read_manifest(path), {"shards": built.shards, "optimizer": built.optimizer}
    load_checkpoint(manifest, biases={}, world=built.mesh.world, **where)
    assert manifest.step == SAVED_AT
    return built


def train_and_save(case: Case, folder: Path) -> list[str]:
    """Some steps and a checkpoint; what one process would read other than this rank holds."""
    built = build(case, init_mesh(case.parallel, "cpu"))
    for step in range(SAVED_AT):
        built.backward(case, step)
        built.update()
    facts = {"step": SAVED_AT, "progress": {"optimizer_steps": SAVED_AT}}
    boxes = own_boxes(built.shards, built.optimizer, {}, built.mesh)
    write_together(folder / "checkpoints", SAVED_AT, boxes, facts, built.mesh.saving)
    path = saved_in(folder)
    for name, saved in json.loads((path / "manifest.json").read_text())["tensors"].items():
        written = sum(prod(part["shape"]) for part in saved["parts"])
        assert written == prod(saved["shape"]), f"{name}: {written} elements written of {saved['shape']}"
    return [f"saved wrong: {key}" for key in unequal(built, state(load(path, build(case, alone()))))]


def resume(case: Case, path: Path, full: dict[str, Tensor], losses: list[float]) -> list[str]:
    """What this rank reads or computes other than one process does that resumed from the same files."""
    built = load(path, build(case, init_mesh(case.parallel, "cpu")))
    found = [f"read wrong: {key}" for key in unequal(built, full)]
    for step, expected in enumerate(losses, start=SAVED_AT):
        loss, _ = built.backward(case, step)
        built.update()
        if not abs(loss / expected - 1) < 1e-5:
            found.append(f"step {step}: loss {loss:.9g}, one process has {expected:.9g}")
    return found


def resharding_pairs(seed: int, count: int) -> list[tuple[Case, ...]]:
    """Random legal layouts, two and two, for one model and equal batches."""
    rng = random.Random(seed)
    model = replace(
        MODEL, num_layers=4, num_heads=24, num_kv_heads=24, head_dim=2, rotary_dim=2, vocab_size=24
    )

    def layout() -> Case:
        while True:
            world = rng.choice([2, 3, 4, 6, 8])
            degrees = {axis: rng.choice([1, 1, 2, 3, 4]) for axis in ("cp", "tp", "ep", "etp")}
            pp = rng.choice([1, 2, 2, 2, 4])  # the rules of pipelines refuse many
            schedule = rng.choice(list(Schedule)) if pp > 1 else Schedule["1f1b"]
            cfg = ParallelConfig(pp=pp, **degrees, schedule=schedule, zero_stage=rng.randint(1, 3))
            sizes = {"row_tokens": 24, "micro_rows": 1, "num_micro": 4}
            try:
                case = Case(parallel=cfg, dp=cfg.dp(world), model=model, **sizes)
                case.run_config().validate(world)
            except (ValueError, ConfigError):
                continue
            return case

    pairs = [(layout(), layout()) for _ in range(count)]
    rows = [lcm(a.dp, b.dp) for a, b in pairs]
    return [
        same_batches(replace(a, micro_rows=n // a.dp), replace(b, micro_rows=n // b.dp))
        for (a, b), n in zip(pairs, rows, strict=True)
    ]


def require_every_axis(pairs: Sequence[tuple[Case, ...]]) -> None:
    """Fail unless each axis is above 1, and each ZeRO stage there, where saved and where loaded."""
    for cases in zip(*pairs, strict=True):
        for axis in ("pp", "cp", "tp", "ep", "etp"):
            assert any(getattr(case.parallel, axis) > 1 for case in cases), axis
        assert any(case.dp > 1 for case in cases)
        assert any(case.parallel.edp(case.world_size) > 1 for case in cases)
        assert {case.parallel.zero_stage for case in cases} == {1, 2, 3}


def same_batches(*pair: Case) -> tuple[Case, ...]:
    """Both with two micro-batches a step if that is legal, four of them else."""
    fewer = tuple(replace(case, num_micro=2) for case in pair)
    try:
        for case in fewer:
            case.run_config().validate(case.world_size)
    except ConfigError:
        return pair
    return fewer


def by_world(cases: list[Case]) -> dict[int, list[int]]:
    """Numbers of the cases of each world size."""
    worlds = sorted({case.world_size for case in cases})
    return {world: [n for n, case in enumerate(cases) if case.world_size == world] for world in worlds}


@pytest.mark.timeout(0)
def test_checkpoint_of_another_layout(tmp_path: Path) -> None:
    """Two steps on one layout, two more on another: no bit is lost, and losses are one process's."""
    pairs = resharding_pairs(seed=3, count=6)
    require_every_axis(pairs)
    savers, loaders = [a for a, _ in pairs], [b for _, b in pairs]
    names = [f"{n}: {a.layout} -> {b.layout}" for n, (a, b) in enumerate(pairs)]
    for world, numbers in by_world(savers).items():
        outcome = run_cases(
            world,
            [names[n] for n in numbers],
            lambda i, numbers=numbers: train_and_save(savers[numbers[i]], tmp_path / str(numbers[i])),
        )
        assert not outcome.failures, explain_failures(outcome)
    for number, case in enumerate(savers):
        files = list(saved_in(tmp_path / str(number)).glob("rank-*.safetensors"))
        assert len(files) == case.world_size
    truths = []
    for number, case in enumerate(loaders):
        path = saved_in(tmp_path / str(number))
        built = load(path, build(case, alone()))
        full = {key: tensor.clone() for key, tensor in state(built).items()}
        assert all(tensor.any() for key, tensor in full.items() if key.startswith("exp_avg."))
        losses = []
        for step in (SAVED_AT, SAVED_AT + 1):
            losses.append(built.backward(case, step)[0])
            built.update()
        truths.append((path, full, losses))
    for world, numbers in by_world(loaders).items():
        outcome = run_cases(
            world,
            [names[n] for n in numbers],
            lambda i, numbers=numbers: resume(loaders[numbers[i]], *truths[numbers[i]]),
        )
        assert not outcome.failures, explain_failures(outcome)


@pytest.mark.parametrize(
    ("degrees", "world", "message"),
    [
        (
            {"tp": 3},
            4,
            "parallel.tp=3: their product 3 must divide the world size 4; choose a product among [1, 2, 4]",
        ),
        ({"ep": 2, "etp": 2}, 2, "their product 4 must divide the world size 2"),
    ],
)
def test_layouts_that_do_not_fit(degrees: dict[str, int], world: int, message: str) -> None:
    cfg = ParallelConfig(**degrees)
    with pytest.raises(ValueError, match=re.escape(message)):
        cfg.dp(world), cfg.edp(world)


@pytest.mark.parametrize(("key", "value"), [("tp", 0), ("zero_stage", 4)])
def test_degrees_out_of_range(key: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"parallel.{key}={value} must be"):
        ParallelConfig(**{key: value})
