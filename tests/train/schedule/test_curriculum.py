"""The staged run: arithmetic of its stages, what is refused, and the program through all of them."""

import json
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from data.config import SourceConfig
from data.dataset import DatasetWriter
from data.mixture import Mixture
from parallel.mesh import one_process
from tests.support.configs import config
from tests.support.forked import ROOT, launch
from tests.support.runs import column, ending, lines
from train.checkpoint.storage import checksum
from train.config import ConfigError, RunConfig
from train.curriculum_stages import build_stages, stage_of, tokens_at, total_steps, validate_stages
from train.guard.signals import StopRequest
from train.schedule.curriculum import CurriculumStageConfig, CurriculumStageLayout, LrShape
from train.training_data import build_data

SOURCES = "data.sources=[{path: corpus/python}]"


def two_sources(*stages: CurriculumStageConfig, **changes: Any) -> RunConfig:
    cfg = config("conf=debug", "data.sources=[{path: a, weight: 3}, {path: b, weight: 1}]")
    no_decay = replace(cfg.schedule, warmup_tokens=0, decay_tokens=0)
    train = replace(cfg.train, steps=None)
    return replace(cfg, curriculum=list(stages), schedule=no_decay, train=train, **changes)


def stage(**settings: Any) -> CurriculumStageConfig:
    """Ten steps of 1024 tokens unless told."""
    return CurriculumStageConfig(**{"name": "s", "tokens": 10240, "global_tokens": 1024, **settings})


def test_stages_follow_each_other_in_whole_steps() -> None:
    cfg = two_sources(
        stage(name="a", tokens=10000, row_tokens=128),  # rounded up to 10 steps
        stage(name="b", tokens=8192, row_tokens=256, global_tokens=2048, micro_rows=1, rope_theta=5e4),
        stage(name="c", parallel=CurriculumStageLayout(tp=2)),
    )
    stages = build_stages(cfg)
    assert [(s.first_step, s.end_step, s.first_tokens) for s in stages] == [
        (0, 10, 0), (10, 14, 10240), (14, 24, 18432),
    ]  # fmt: skip
    assert [stage_of(stages, step).name for step in (0, 9, 10, 13, 14, 23, 24)] == list("aabbccc")
    assert tokens_at(stages, 12) == 10240 + 2 * 2048
    assert tokens_at(stages, 24) == 28672
    b = stages[1].cfg
    assert (b.batch.row_tokens, b.batch.micro_rows, b.model.rope_theta) == (256, 1, 5e4)
    assert b.parallel == cfg.parallel
    assert stages[2].cfg.parallel.tp == 2
    assert cfg.batch.row_tokens == stages[2].cfg.batch.row_tokens == 128  # nothing was changed in place
    assert total_steps(stages) == 24
    short = replace(cfg, train=replace(cfg.train, steps=7))
    assert total_steps(build_stages(short)) == 7


def test_mixture_moves_linearly_and_changes_in_the_final_part() -> None:
    first = stage(length_shares=[1.0, 0.0, 0.0])
    second = stage(
        weights=[1, 3], length_shares=[0, 0.5, 0.5], transition_tokens=4096, final_fraction=0.2,
        final_weights=[0, 1],
    )  # fmt: skip
    a, b = build_stages(two_sources(first, second))
    assert a.mixture_at(0) == a.mixture_at(10239) == Mixture((3, 1), (1, 0, 0))
    assert b.mixture_at(10240) == Mixture((0.75, 0.25), (1, 0, 0))
    halfway = b.mixture_at(10240 + 2048)
    assert halfway.weights == pytest.approx((0.5, 0.5))
    assert halfway.length_shares == pytest.approx((0.5, 0.25, 0.25))
    assert b.mixture_at(10240 + 4096).weights == (1, 3)
    assert b.mixture_at(10240 + 8191).weights == (1, 3)
    assert b.mixture_at(10240 + 8192).weights == (0, 1)
    (third,) = build_stages(two_sources(first, second, stage(transition_tokens=1024)))[2:]
    assert third.mixture_at(third.first_tokens).weights == pytest.approx((0, 1))  # from the final part on


@pytest.mark.parametrize(
    ("shape", "middle"),
    [(LrShape.linear, 5.5e-4), (LrShape.cosine, 5.5e-4), (LrShape.exponential, 10**-3.5)],
)
def test_learning_rate_segments(shape: LrShape, middle: float) -> None:
    cfg = two_sources(stage(lr=1e-3), stage(lr=1e-3, lr_end=1e-4, lr_shape=shape))
    a, b = build_stages(replace(cfg, schedule=replace(cfg.schedule, warmup_tokens=2048)))
    assert a.lr_at(1024, 20480) == pytest.approx(5e-4)
    assert a.lr_at(2048, 20480) == 1e-3
    rates = [b.lr_at(10240 + tokens, 20480) for tokens in (0, 5120, 10240)]
    assert rates == pytest.approx([1e-3, middle, 1e-4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens=0 must be above 0"),
        ({"transition_tokens": 20000}, "transition_tokens=20000 must lie in [0, tokens=10240]"),
        ({"final_fraction": 0.2}, "needs final_weights"),
        ({"final_weights": [1, 1]}, "needs final_weights"),
        ({"lr_end": 1e-4}, "lr_shape=constant: constant has none"),
        ({"lr_shape": LrShape.linear}, "others need one"),
        ({"weights": [1]}, "weights=[1] must be 2 numbers"),
        ({"parallel": CurriculumStageLayout(zero_stage=4)}, "parallel.zero_stage=4 must be"),
        ({"row_tokens": 100}, "batch.global_tokens=1024 must be a multiple"),
        ({"parallel": CurriculumStageLayout(tp=3)}, "parallel.tp=3"),
    ],
)
def test_what_a_stage_may_not_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValueError)) as caught:
        validate_stages(build_stages(two_sources(stage(), stage(name="late", **changes))), 1)
    assert message in str(caught.value)
    assert "late" in str(caught.value)


@pytest.mark.parametrize("layout", [{}, {"parallel": CurriculumStageLayout(tp=2)}])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"length_shares": [1, 0, 1]}),  # no document is that long
        ({}, {"length_shares": [1, 0, 0], "final_fraction": 0.1, "final_weights": [0, 1]}),
        ({"weights": [0, 1]}, {"weights": [1, 1], "length_shares": [1, 0, 0], "transition_tokens": 1024}),
    ],
    ids=["its own", "its last", "its first"],
)
def test_mixtures_of_all_stages_are_checked_before_the_first_step(
    first: dict[str, Any], second: dict[str, Any], layout: dict[str, Any], tmp_path: Path
) -> None:
    for name, length in (("a", 50), ("b", 500)):
        with DatasetWriter(tmp_path / name, vocab_size=512) as writer:
            for _ in range(9):
                writer.add(np.zeros(length, np.int64))
    sources = [SourceConfig(path=str(tmp_path / name)) for name in "ab"]
    cfg = two_sources(stage(**first), stage(name="late", **second, **layout))
    stages = build_stages(replace(cfg, data=replace(cfg.data, sources=sources, length_bounds=[100, 1000])))
    with pytest.raises(ValueError, match=r"curriculum stage late: data\.length_shares\[[02]\]="):
        build_data(stages, stages[0], one_process(torch.device("cpu")), StopRequest())


def test_a_run_needs_an_end_and_one_kind_of_decay() -> None:
    cfg = two_sources()
    with pytest.raises(ConfigError, match="needs a curriculum, whose end it means"):
        build_stages(cfg)
    decaying = replace(cfg, curriculum=[stage()], schedule=replace(cfg.schedule, decay_tokens=5))
    with pytest.raises(ConfigError, match="must be 0 with a curriculum"):
        build_stages(decaying)


def test_the_published_recipe() -> None:
    stages = build_stages(config("conf=minimax_text_01", SOURCES))
    validate_stages(stages, 1)
    borders = [stage.first_tokens for stage in stages]
    batches = [stage.cfg.batch.global_tokens // 2**20 for stage in stages]
    assert batches == [16, 32, 64, 128, 128, 128, 128, 128, 128]
    assert borders[1:5] == pytest.approx([69e9, 790e9, 4.7e12, 7.2e12], rel=1e-3)
    rows = [stage.cfg.batch.row_tokens for stage in stages]
    assert rows == [8192] * 6 + [2**17, 2**19, 2**20]
    end = total_steps(stages)
    assert stages[5].lr_at(stages[6].first_tokens, tokens_at(stages, end)) == pytest.approx(3e-5)
    assert [s.own.length_shares for s in stages[6:]] == [(0.3, 0.7, 0), (0.35, 0.35, 0.3), (0.3, 0.3, 0.4)]


def test_the_program_shows_the_published_recipe() -> None:
    shown = yaml.safe_load(launch("conf=minimax_text_01", SOURCES, "--cfg", "job").stdout)
    recipe = OmegaConf.to_object(OmegaConf.load(ROOT / "conf/curriculum/minimax_01.yaml"))["curriculum"]
    assert len(recipe) == 9
    assert shown["model"]["num_layers"] == 80
    assert [known | said for known, said in zip(shown["curriculum"], recipe, strict=True)] == shown[
        "curriculum"
    ]


RECORDER = ROOT / "tests/support/programs/record_rows.py"
"""The program; it also writes what each step reads."""


def staged(run_dir: Path, *overrides: str) -> list[str]:
    return ["conf=curriculum_small", f"run_dir={run_dir}", "checkpoint.keep=null", *overrides]


def small(run_dir: Path, *overrides: str, processes: int = 0) -> None:
    done = launch(*staged(run_dir, *overrides), processes=processes, program=RECORDER)
    assert not any(done.codes), done.said


def rows_read(run_dir: Path) -> dict[int, list[str]]:
    """Digests of the rows of each step in their global order: micro-batch, data-parallel rank, row."""
    ranks: dict[int, dict[str, None]] = {}  # what ranks with the same rows read, once
    for path in sorted(run_dir.glob("rows-*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            ranks.setdefault(line["step"], {})[json.dumps(line["rows"])] = None
    return {
        step: [row for parts in zip(*map(json.loads, read), strict=True) for part in parts for row in part]
        for step, read in sorted(ranks.items())
    }


def manifest(run_dir: Path, step: int) -> dict[str, Any]:
    return json.loads((run_dir / f"checkpoints/step-{step}/manifest.json").read_text())


def data_state(run_dir: Path, step: int) -> dict[str, Any]:
    return manifest(run_dir, step)["data"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three stages in one process: 6 + 6 + 4 steps."""
    run_dir = tmp_path_factory.mktemp("curriculum") / "whole"
    small(run_dir, "checkpoint.every=4")
    return run_dir


def test_three_stages_in_one_command(whole: Path) -> None:
    records = lines(whole)
    assert [r["row_tokens"] for r in records] == [256] * 6 + [1024] * 6 + [4096] * 4
    assert [r["global_tokens"] for r in records] == [4096] * 12 + [8192] * 4
    assert records[-1]["tokens"] == 12 * 4096 + 4 * 8192
    assert records[-1]["loss"] < records[0]["loss"] - 0.2
    assert records[-1]["lr"] == pytest.approx(1e-4)
    assert records[11]["lr"] == pytest.approx(5e-4)
    assert ending(whole)[0] == "DONE"
    read = rows_read(whole)
    assert [len(read[step]) for step in range(1, 17)] == [16] * 6 + [4] * 6 + [2] * 4
    assert len({row for rows in read.values() for row in rows}) == 6 * 16 + 6 * 4 + 4 * 2  # none twice
    windows = manifest(whole, 16)["health"]["windows"]  # what is usual in the last stage
    assert windows == {key: column(whole, key).tolist()[12:] for key in ("loss", "grad_norm")}


def test_interrupted_anywhere_it_is_bitwise_the_same(whole: Path, tmp_path: Path) -> None:
    """At both borders, inside both transitions, and inside a stage; one run directory all the way."""
    for step in (3, 6, 7, 12, 13):
        small(tmp_path / "cut", f"train.steps={step}")
    small(tmp_path / "cut")
    assert_same_run(tmp_path / "cut", whole)
    assert data_state(tmp_path / "cut", 16) == data_state(whole, 16)
    assert manifest(tmp_path / "cut", 16)["health"] == manifest(whole, 16)["health"]
    counted = manifest(whole, 16)["progress"]["consumed"]
    assert manifest(tmp_path / "cut", 16)["progress"]["consumed"] == counted
    ends = [data_state(tmp_path / "cut", step)["source_tokens"] for step in (6, 12, 16)]
    assert list(counted.values()) == [
        [b - a for a, b in zip(before, after, strict=True)]
        for before, after in zip([[0] * len(ends[0]), *ends], ends, strict=False)
    ]
    assert [sum(tokens) for tokens in counted.values()] == pytest.approx(
        [6 * 4096, 6 * 4096, 4 * 8192], rel=0.05
    )


def assert_same_run(run_dir: Path, whole: Path) -> None:
    for key in ("step", "loss", "grad_norm", "lr", "tokens"):
        assert column(run_dir, key).tolist() == column(whole, key).tolist(), key
    assert rows_read(run_dir) == rows_read(whole)


def test_killed_at_random_it_is_bitwise_the_same(whole: Path, tmp_path: Path) -> None:
    """Three times, each at some moment after a random record; what no checkpoint holds is done again."""
    records = sorted(random.sample(range(1, 13), 3))
    run_dir = tmp_path / "killed"
    for least in records:
        process = subprocess.Popen(
            [sys.executable, str(RECORDER), *staged(run_dir, "checkpoint.every=1")],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        path = run_dir / "metrics.jsonl"
        while not path.exists() or path.read_text().count("\n") < least:
            assert process.poll() is None, records
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.2))
        process.kill()
        process.wait()
        assert not (run_dir / "DONE").exists(), records
    small(run_dir, "checkpoint.every=1")
    assert_same_run(run_dir, whole)
    assert data_state(run_dir, 16) == data_state(whole, 16)


def test_a_checkpoint_from_before_stages_were_counted(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "old"
    small(run_dir, "train.steps=8")
    path = run_dir / "checkpoints/step-8/manifest.json"
    found = json.loads(path.read_text())
    del found["progress"]["consumed"], found["checksum"]
    path.write_text(json.dumps({**found, "checksum": checksum(found)}))
    small(run_dir)
    counted = manifest(run_dir, 16)["progress"]["consumed"]
    assert counted["before"] == found["data"]["source_tokens"]
    assert len(counted) == 3
    totals = data_state(run_dir, 16)["source_tokens"]
    assert [sum(column) for column in zip(*counted.values(), strict=True)] == totals
    assert column(run_dir, "loss").tolist() == column(whole, "loss").tolist()


def test_other_layouts_read_the_same_tokens(whole: Path, tmp_path: Path) -> None:
    """The layout contract across resumes inside stages and at a border.

    One run on dp x cp = 1 x 1, 2 x 1, 2 x 2 and 1 x 1 again, at equal micro_rows * dp.
    """
    run_dir = tmp_path / "moved"
    on_two = [f"curriculum.{n}.micro_rows={rows}" for n, rows in enumerate((2, 1))]
    small(run_dir, "train.steps=4")
    small(run_dir, *on_two, "train.steps=8", processes=2)
    small(run_dir, *on_two, "parallel.cp=2", "train.steps=12", processes=4)
    small(run_dir)
    assert rows_read(run_dir) == rows_read(whole)
    for step in (4, 8, 12, 16):
        assert data_state(run_dir, step) == data_state(whole, step)
    for key in ("loss", "grad_norm"):
        assert column(run_dir, key) == pytest.approx(column(whole, key), rel=1e-5)


def test_a_pipeline_is_rebuilt_at_each_border(whole: Path, tmp_path: Path) -> None:
    small(tmp_path / "pp", "parallel.pp=2", processes=2)
    assert column(tmp_path / "pp", "loss") == pytest.approx(column(whole, "loss"), rel=1e-5)


def test_a_stage_on_another_layout_ends_the_process_and_the_same_command_goes_on(
    whole: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "moves"
    arguments = ("conf=curriculum_small", f"run_dir={run_dir}", "train.steps=9")
    arguments = (*arguments, "curriculum.0.micro_rows=2", "curriculum.1.parallel.cp=2")
    first = launch(*arguments, processes=2)
    assert first.codes == [75, 75]
    name, found = ending(run_dir)
    assert (name, found["code"], found["step"]) == ("REQUEUE", 75, 6)
    assert "1024" in found["reason"]
    second = launch(*arguments, processes=2)
    assert second.codes == [0, 0], second.said
    assert ending(run_dir)[0] == "DONE"
    assert column(run_dir, "loss") == pytest.approx(column(whole, "loss")[:9], rel=1e-5)
