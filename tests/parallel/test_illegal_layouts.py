"""What cannot run is refused before anything starts, with key, value, rule and remedy."""

import re
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from data.config import DataConfig, SourceConfig
from model.config import ModelConfig, RouterConfig
from parallel.config import ParallelConfig, Schedule
from tests.support.forked import launch
from tests.support.runs import ending
from train.config import BatchConfig, ConfigError, RunConfig, TrainConfig, user_errors

LEGAL: dict[str, int] = {
    "num_layers": 8, "hidden_size": 24, "num_heads": 12, "num_kv_heads": 12, "head_dim": 4, "rotary_dim": 4,
    "vocab_size": 48, "num_experts": 24, "expert_ffn_size": 24, "row_tokens": 48, "micro_rows": 1, "micro": 8,
}  # fmt: skip
SPLIT = (Schedule.interleaved_zero_bubble, Schedule.zbv, Schedule.dualpipev)
INTERLEAVED = (Schedule.interleaved, Schedule.interleaved_zero_bubble)
RULE = re.compile(r"\b(must|needs|loses|wrong)\b")
REMEDY = re.compile(r"\b(use|choose|nearest|set|at least|multiple)\b")


def validate(world: int, **keys: Any) -> None:
    """Check a run of `LEGAL` with some keys changed."""
    with user_errors():
        sizes = {**LEGAL, **{key: value for key, value in keys.items() if key in LEGAL}}
        parallel = ParallelConfig(
            **{key: value for key, value in keys.items() if key in vars(ParallelConfig())}
        )
        row_tokens, micro_rows, micro = (sizes.pop(key) for key in ("row_tokens", "micro_rows", "micro"))
        unit = row_tokens * micro_rows * parallel.dp(world)
        batch = BatchConfig(
            row_tokens=row_tokens,
            micro_rows=micro_rows,
            global_tokens=keys.get("global_tokens", unit * micro),
        )
        RunConfig(
            name="x",
            run_dir="x",
            model=ModelConfig(**sizes),
            data=DataConfig(sources=[SourceConfig(path="x")]),
            batch=batch,
            parallel=parallel,
            train=TrainConfig(steps=1),
            router=RouterConfig(**keys.get("router", {})),
        ).validate(world)


def illegal() -> Iterator[tuple[int, dict[str, Any], str]]:
    """(world size, what differs from a legal run, a culprit that the message names), rule by rule."""
    for axis, world in product(("pp", "cp", "tp", "ep", "etp"), (2, 4, 6, 8)):
        for degree in (0, 5, world + 1):
            yield world, {axis: degree}, f"parallel.{axis}={degree}"
    for groups, world in ((3, 4), (8, 4), (5, 8)):
        router = {"pool_groups": groups, "capacity_factor": 1.0}
        yield world, {"ep": 1, "router": router}, f"router.pool_groups={groups}"
    for stage in (0, 4):
        yield 2, {"zero_stage": stage}, f"parallel.zero_stage={stage}"
    for tp in (2, 4, 8):
        yield (
            8,
            {"tp": tp, "num_heads": 3, "num_kv_heads": 1},
            f"parallel.tp={tp} must divide model.num_heads=3",
        )
        yield 8, {"tp": tp, "num_heads": 24, "vocab_size": 49}, "model.vocab_size=49"
        yield 8, {"tp": tp, "num_heads": 24, "num_kv_heads": 3}, "model.num_kv_heads=3"
        yield 8, {"tp": tp, "num_heads": 24, "num_kv_heads": 1, "row_tokens": 9}, "batch.row_tokens"
        yield 8, {"ep": tp, "num_experts": 9}, "model.num_experts=9"
        yield 8, {"etp": tp, "expert_ffn_size": 9}, "model.expert_ffn_size=9"
        yield 8, {"cp": tp, "row_tokens": 51}, "batch.row_tokens=51"
        yield 8, {"cp": tp, "row_tokens": 2 * tp + 2}, f"2 * parallel.cp={2 * tp}"
        yield 8, {"cp": 2, "tp": 4, "row_tokens": 4 * tp + 4, "etp": 4}, "batch.row_tokens"
    for hidden, ffn in ((25, 24), (24, 25), (12, 6), (20, 21)):
        yield 8, {"num_experts": 4, "hidden_size": hidden, "expert_ffn_size": ffn}, "edp"
        yield 8, {"num_experts": 2, "ep": 2, "hidden_size": 2 * hidden, "expert_ffn_size": ffn}, "edp"
    for schedule, pp in product(Schedule, (2, 4)):
        stages = pp if schedule is Schedule["1f1b"] else 2 * pp
        yield 4, {"pp": pp, "schedule": schedule, "num_layers": stages - 1}, f"model.num_layers={stages - 1}"
    for schedule, pp, world in product(SPLIT, (2, 4), (4, 8)):
        yield world, {"pp": pp, "schedule": schedule, "zero_stage": 3}, "parallel.zero_stage=3"
    for schedule in SPLIT:
        yield 4, {"pp": 2, "tp": 2, "schedule": schedule}, f"parallel.schedule={schedule}"
        yield 8, {"pp": 2, "tp": 4, "ep": 2, "schedule": schedule}, f"parallel.schedule={schedule}"
    for pp, micro in ((2, 1), (4, 1), (4, 2), (4, 3)):
        yield 8, {"pp": pp, "micro": micro}, f"not {micro} micro-batches"
    for pp, micro in ((2, 3), (4, 4), (4, 7)):
        yield 8, {"pp": pp, "micro": micro, "schedule": Schedule.dualpipev}, f"not {micro} micro-batches"
    for schedule, (pp, micro) in product(INTERLEAVED, ((2, 5), (2, 7), (4, 9), (4, 11))):
        yield 8, {"pp": pp, "micro": micro, "schedule": schedule}, f"not {micro} micro-batches"
    for world, tokens in product((2, 4, 8), (1, 47, 1000, 4801)):
        yield world, {"global_tokens": tokens}, f"batch.global_tokens={tokens}"
    for key in ("row_tokens", "micro_rows", "global_tokens"):
        yield 2, {key: 0, **({"global_tokens": 96} if key != "global_tokens" else {})}, f"batch.{key}=0"


def test_every_illegal_layout_is_refused_with_a_remedy() -> None:
    """Without process groups, a hundred in seconds."""
    validate(1), validate(8, pp=2, tp=2, ep=2, etp=2, zero_stage=3)  # the start is legal
    start, count, wrong = time.monotonic(), 0, []
    for world, keys, culprit in illegal():
        count += 1
        try:
            validate(world, **keys)
        except ConfigError as error:
            text = str(error)
        else:
            wrong.append(f"accepted on {world}: {keys}")
            continue
        lacks = [what for what, found in {
            "the culprit": culprit in text,
            "key=value": "=" in text,
            "a rule": RULE.search(text),
            "a remedy": REMEDY.search(text),
        }.items() if not found]  # fmt: skip
        wrong += [f"lacks {' and '.join(lacks)} ({culprit}): {text}"] if lacks else []
    assert not wrong, "\n".join(wrong)
    assert count >= 100
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.tp=3"], "parallel.tp=3"),
        (["parallel.tp=2", "model.num_heads=3", "model.num_kv_heads=1"], "model.num_heads=3"),
        (["parallel.ep=2", "model.num_experts=7"], "model.num_experts=7"),
        (["parallel.cp=2", "batch.row_tokens=126", "batch.global_tokens=504"], "batch.row_tokens=126"),
        (["parallel.pp=2", "parallel.schedule=zbv", "parallel.zero_stage=3"], "parallel.zero_stage=3"),
        (["parallel.pp=2", "batch.global_tokens=256"], "not 1 micro-batches"),
    ],
)
def test_refused_by_the_program(overrides: list[str], message: str, tmp_path: Path) -> None:
    """Both processes end before they meet; the run directory says why."""
    result = launch("conf=debug", f"run_dir={tmp_path}", *overrides, processes=2, timeout_s=60)
    assert result.codes == [2, 2]
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert message in errors[0], result.stderr
    kind, facts = ending(tmp_path)
    assert kind == "FAILED"
    assert facts["code"] == 2
    assert message in facts["reason"]


def test_schedules_that_an_older_torch_computes_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """V-shaped ones before torch 2.13."""
    for schedule in (Schedule.zbv, Schedule.dualpipev):
        validate(2, pp=2, schedule=schedule)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.11.0+cu130"))
    for schedule in (Schedule.zbv, Schedule.dualpipev):
        with pytest.raises(ConfigError, match=rf"{schedule} gives wrong gradients in torch 2\.11.*use sch"):
            validate(2, pp=2, schedule=schedule)
    validate(4, pp=2, schedule=Schedule.interleaved_zero_bubble)
