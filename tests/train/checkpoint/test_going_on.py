"""Which checkpoint a run goes on from: the newest that is whole, the same on every rank, or an error."""

import json
import logging
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from data.dataset import DatasetWriter
from parallel.collectives import Axis
from parallel.launch import join_job
from tests.support.checkpoints import content_of, make, write
from tests.support.configs import config
from tests.support.dist import run_distributed
from tests.support.forked import launch, pretrain
from tests.support.runs import column, ending, lines, tensors
from train.changes import judge_changes
from train.checkpoint.contents import Change, CheckpointConfig, Resume
from train.checkpoint.manifest import read_manifest
from train.checkpoint.restore import Verify, read_boxes
from train.checkpoint.resume import NoCheckpointError, choose_start, saved_model
from train.checkpoint.storage import MANIFEST, Box, find_checkpoints
from train.config import CONF_DIR, ConfigError, RunConfig, adopt_model, load_config, register_schema
from train.curriculum_stages import build_stages
from train.guard.signals import StoppedEarly, StopRequest

ALONE = Axis("world", 0, (0,))
SHARD = "rank-00001.safetensors"


def saved(run_dir: Path, *steps: int) -> Path:
    """A run directory with checkpoints of these steps; the folder of checkpoints."""
    for step in steps:
        folder = make(run_dir / "checkpoints", step, shift=step)
        progress = {"step": step, "tokens": 100 * step, "optimizer_steps": step}
        write(folder, {**content_of(folder), "progress": progress, "data": {}, "config": {}})
    return run_dir / "checkpoints"


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def swap(path: Path) -> None:
    shutil.copy(path.parents[1] / "step-1" / path.name, path)


def edit(path: Path) -> None:
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "step": 1}))


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "bit flip": (SHARD, flip, "sha256 "),
    "bit flip in what the other rank hashes": ("rank-00000.safetensors", flip, "sha256 "),
    "truncated": (SHARD, lambda path: path.write_bytes(path.read_bytes()[:-3]), "bytes, expected "),
    "deleted": (SHARD, Path.unlink, "not readable: No such file"),
    "swapped": (SHARD, swap, "sha256 "),
    "empty manifest": ("manifest.json", lambda path: path.write_text(""), "not readable"),
    "flipped manifest": ("manifest.json", edit, "checksum "),
    "no manifest": ("manifest.json", Path.unlink, "not readable: No such file"),
    "pickle": ("evil.pkl", lambda path: path.write_bytes(b"cos\nsystem\n."), "does not name it"),
}


def choose_on(rank: int, run_dir: Path, cfg: CheckpointConfig, out: Path) -> None:
    """What each rank chooses, or the text of its error, and what it logs."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("train.checkpoint.resume").addHandler(handler)
    try:
        result: Any = choose_start(run_dir, cfg, join_job("cpu"), StopRequest()).step
    except NoCheckpointError as error:
        result = str(error)
    (out / f"{rank}.json").write_text(json.dumps([result, said]))


def choose(run_dir: Path, cfg: CheckpointConfig, out: Path, ranks: int = 2) -> list[tuple[Any, list[str]]]:
    run_distributed(choose_on, ranks, run_dir, cfg, out)
    return [tuple(json.loads((out / f"{rank}.json").read_text())) for rank in range(ranks)]


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_rejected_with_its_reason_and_the_one_before_is_used(
    name: str, damage: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    root = saved(tmp_path / "run", 1, 2, 10)
    damage(root / "step-10" / name)
    damaged = {path.name: path.read_bytes() for path in (root / "step-10").iterdir()}
    (step, said), (other, heard) = choose(tmp_path / "run", CheckpointConfig(), tmp_path)
    assert step == other == 2
    assert heard == []
    assert said[0].startswith(f"rejected step-10: {root}/step-10/{name}: ")
    assert reason in said[0]
    assert names(root) == ["rejected-step-10", "step-1", "step-2"]  # a later save of step 10 meets nothing
    assert {path.name: path.read_bytes() for path in (root / "rejected-step-10").iterdir()} == damaged


def test_without_fallback_a_rejection_is_an_error(tmp_path: Path) -> None:
    root = saved(tmp_path / "run", 1, 2)
    flip(root / "step-2" / SHARD)
    before = names(root)
    for result, _ in choose(tmp_path / "run", CheckpointConfig(fallback=False), tmp_path):
        assert "the newest checkpoint was rejected, and checkpoint.fallback=false" in result
        assert f"{root}/step-2/{SHARD}: sha256" in result
    assert names(root) == before


@pytest.mark.parametrize("resume", [Resume.auto, Resume.must])
def test_when_all_are_damaged_every_reason_is_listed(resume: Resume, tmp_path: Path) -> None:
    root = saved(tmp_path / "run", 1, 2)
    flip(root / "step-2" / SHARD)
    (root / "step-1/manifest.json").unlink()  # a crash of somebody's copy: incomplete
    for result, _ in choose(tmp_path / "run", CheckpointConfig(resume=resume), tmp_path):
        assert f"{root}/step-2/{SHARD}: sha256" in result
        assert f"{root}/step-1/manifest.json: not readable" in result
    assert names(root) == ["step-1", "step-2"]


def test_must_and_none_and_fresh_starts(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpointError, match=r"checkpoint\.resume=must, but .* holds no step-N"):
        choose_start(tmp_path, CheckpointConfig(resume=Resume.must), ALONE, StopRequest())
    assert choose_start(tmp_path, CheckpointConfig(), ALONE, StopRequest()) == (None, None)
    root = saved(tmp_path, 3)
    assert choose_start(tmp_path, CheckpointConfig(resume=Resume.never), ALONE, StopRequest()) == (None, None)
    (root / "step-3").rename(root / "step-3.old")  # somebody's: no reason for random weights
    with pytest.raises(NoCheckpointError, match="the folder's name says otherwise"):
        choose_start(tmp_path, CheckpointConfig(), ALONE, StopRequest())


def test_steps_are_numbers(tmp_path: Path) -> None:
    for name in ("step-9", "step-10", "step-²", "step-x", "rejected-step-11", ".tmp-step-12"):
        (tmp_path / name).mkdir()
    found = find_checkpoints(tmp_path, complete=False)
    assert [path.name for path in found][:2] == ["step-10", "step-9"]
    assert list(found.values()) == [10, 9, -1, -1]
    (tmp_path / "step-9" / MANIFEST).touch()
    (tmp_path / "step-x" / MANIFEST).touch()
    assert find_checkpoints(tmp_path, complete=True) == {tmp_path / "step-9": 9}


def test_rejected_twice_keeps_both(tmp_path: Path) -> None:
    for _ in range(2):
        root = saved(tmp_path, 2) if (tmp_path / "checkpoints/step-1").exists() else saved(tmp_path, 1, 2)
        flip(root / "step-2" / SHARD)
        assert choose_start(tmp_path, CheckpointConfig(), ALONE, StopRequest()).step == 1
    assert names(root) == ["rejected-step-2", "rejected-step-2-2", "step-1"]


def test_what_each_level_of_verification_sees(tmp_path: Path) -> None:
    root = saved(tmp_path, 1, 2)
    flip(root / "step-2" / SHARD)

    def chosen(verify: Verify) -> int:
        return choose_start(tmp_path, CheckpointConfig(verify=verify), ALONE, StopRequest()).step

    assert chosen(Verify.size) == chosen(Verify.off) == 2
    edit(root / "step-2/manifest.json")
    content = content_of(root / "step-2")
    content["step"] = 2  # sense, but another checksum
    (root / "step-2/manifest.json").write_text(json.dumps({**content, "x": 1}))
    assert chosen(Verify.off) == 2
    assert chosen(Verify.size) == 1


def test_a_checkpoint_from_before_hashes(tmp_path: Path) -> None:
    root = saved(tmp_path, 1)
    content = content_of(root / "step-1")
    del content["files"], content["checksum"]
    (root / "step-1/manifest.json").write_text(json.dumps(content))
    with pytest.raises(NoCheckpointError, match=r"holds no hashes.*set checkpoint\.verify=off"):
        choose_start(tmp_path, CheckpointConfig(), ALONE, StopRequest())
    assert choose_start(tmp_path, CheckpointConfig(verify=Verify.off), ALONE, StopRequest()).step == 1


def test_a_rank_that_hashes_long_is_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block ends a beat, so the ranks meet many times, unequally often, and still agree."""
    monkeypatch.setattr("train.checkpoint.resume.BEAT_SECONDS", -1.0)
    monkeypatch.setattr("train.checkpoint.restore.BLOCK", 16)
    root = saved(tmp_path / "run", 5, 6)
    flip(root / "step-6" / SHARD)  # its last byte
    assert [step for step, _ in choose(tmp_path / "run", CheckpointConfig(), tmp_path, 3)] == [5, 5, 5]


def test_a_stop_while_checkpoints_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes effect at the next block, with all folders as they were, the damaged one, too."""
    monkeypatch.setattr("train.checkpoint.restore.BLOCK", 16)
    root, stop = saved(tmp_path / "run", 5, 6), StopRequest()
    flip(root / "step-6" / SHARD)
    stop._note(signal.SIGTERM, None)
    with pytest.raises(StoppedEarly, match="SIGTERM while checkpoints were checked"):
        choose_start(tmp_path / "run", CheckpointConfig(), ALONE, stop)
    assert names(root) == ["step-5", "step-6"]


def test_weights_of_another_run(tmp_path: Path) -> None:
    root = saved(tmp_path / "other", 1, 2)
    flip(root / "step-2" / SHARD)
    for init, step in ((tmp_path / "other", 1), (root / "step-1", 1)):
        start = choose_start(tmp_path / "run", CheckpointConfig(init=str(init)), ALONE, StopRequest())
        assert start.resumed is None
        assert start.initial is not None
        assert start.initial.step == step
        assert start.step == 0
    assert names(root) == ["step-1", "step-2"]  # another's folders stay as they are
    with pytest.raises(
        NoCheckpointError, match=rf"checkpoint\.init={root}/step-2: every checkpoint was rejected:\n.*sha256"
    ):
        choose_start(tmp_path / "run", CheckpointConfig(init=str(root / "step-2")), ALONE, StopRequest())
    content = {**content_of(root / "step-1"), "kind": "weights", "step": 0}
    (root / "step-1").rename(root / "step-0")
    write(root / "step-0", content)
    assert choose_start(
        tmp_path / "run", CheckpointConfig(init=str(root / "step-0")), ALONE, StopRequest()
    ).initial
    shutil.rmtree(root / "step-2")
    with pytest.raises(NoCheckpointError, match="holds weights only"):
        choose_start(tmp_path / "other", CheckpointConfig(), ALONE, StopRequest())
    saved(tmp_path / "run", 4)  # the run's own goes before
    assert choose_start(tmp_path / "run", CheckpointConfig(init="gone"), ALONE, StopRequest()).step == 4


SOURCES = "data.sources=[{path: a, weight: 1.0}]"


def changed(tmp_path: Path, now: RunConfig, *allowed: Change, before: RunConfig | None = None) -> str:
    """What judge_changes refuses; "" = nothing."""
    cfg = before or config("conf=debug", SOURCES)
    folder = saved(tmp_path / str(len(list(tmp_path.iterdir()))), 3) / "step-3"
    write(folder, {**content_of(folder), "config": json.loads(json.dumps(asdict(cfg)))})
    try:
        judge_changes(read_manifest(folder), build_stages(now), allowed, world_size=now.parallel.tp)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("override", "line", "kind"),
    [
        ("model.num_layers=8", "model.num_layers: 4 -> 8", "model"),
        ("model.rope_theta=5e5", "model.rope_theta: 10000.0 -> 500000.0", "model"),
        ("router.balancing=bias", "router.balancing: 'aux_loss' -> 'bias'", "model"),
        ("optimizer.lr=0.002", "optimizer.lr: 0.001 -> 0.002", "optimizer"),
        ("router.aux_loss_coefficient=0.5", "router.aux_loss_coefficient: 0.01 -> 0.5", "optimizer"),
        ("batch.global_tokens=2048", "batch.global_tokens: 1024 -> 2048", "optimizer"),
        ("seed=5", "seed: 0 -> 5", "data"),
        ("data.packing=best_fit", "data.packing: 'concatenate' -> 'best_fit'", "data"),
        ("data.sources=[{path: a, weight: 2.0}]", "data.sources.0.weight: 1.0 -> 2.0", "data"),
        ("data.sources=[{path: a}, {path: b}]", "data.sources.1.weight: (none) -> 1.0", "data"),
        ("data.sources=[{path: moved}]", "data.sources.0.path: 'a' -> 'moved'", None),
        ("parallel.tp=2", "parallel.tp: 1 -> 2", None),
        ("batch.micro_rows=1", "batch.micro_rows: 2 -> 1", None),
        ("train.steps=50", "train.steps: 20 -> 50", None),
        ("schedule.decay_tokens=1", "schedule.decay_tokens: 8192 -> 1", None),
        ("optimizer.offload=cpu", "optimizer.offload: 'none' -> 'cpu'", None),
        ("optimizer.implementation=torch", "optimizer.implementation: 'auto' -> 'torch'", None),
        ("log.every=5", "log.every: 1 -> 5", None),
    ],
)
def test_changes_are_shown_and_judged(
    override: str, line: str, kind: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    now = config("conf=debug", SOURCES, override)
    said = changed(tmp_path, now)
    assert f"changed since step-3: {line}" in caplog.text
    assert (line in said) == (kind is not None)
    if kind == "model":
        assert "checkpoint.init=" in said
        assert changed(tmp_path, now, *Change)
    elif kind is not None:
        assert f"checkpoint.allow_changes=[{kind}]" in said
        assert not changed(tmp_path, now, Change(kind))
        assert changed(tmp_path, now, *(set(Change) - {Change(kind)}))


def test_other_rows_in_a_micro_batch_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fewer ranks at equal micro_rows; equal rows on other ranks are the same micro-batch."""
    caplog.set_level(logging.INFO)
    now = config("conf=debug", SOURCES)
    folder = saved(tmp_path, 3) / "step-3"
    facts = {"config": json.loads(json.dumps(asdict(now))), "pool_rows": 4}
    write(folder, {**content_of(folder), **facts})
    judge_changes(read_manifest(folder), build_stages(now), [], world_size=2)
    assert "micro_rows * dp" not in caplog.text
    judge_changes(read_manifest(folder), build_stages(now), [], world_size=1)
    assert "changed since step-3: batch.micro_rows * dp: 4 -> 2: capacity and aux loss" in caplog.text


def test_stages_ahead_may_change(tmp_path: Path) -> None:
    before = config("conf=curriculum_small", "data.sources=[{path: a}]")
    for number, refused in ((0, True), (1, False)):
        stages = list(before.curriculum)
        stages[number] = replace(stages[number], weights=[2.0], final_fraction=0.5, final_weights=[1.0])
        said = changed(tmp_path, replace(before, curriculum=stages), before=before)  # in stage 0 at step 3
        assert (f"curriculum.{number}.weights" in said) == refused


def test_fields_of_another_version_are_no_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    folder = saved(tmp_path, 3) / "step-3"
    cfg = json.loads(json.dumps(asdict(config("conf=debug", SOURCES))))
    del cfg["model"]["slope_rule"], cfg["health"]
    cfg["optimizer"]["gone"] = 1
    write(folder, {**content_of(folder), "config": cfg})
    judge_changes(read_manifest(folder), build_stages(config("conf=debug", SOURCES)), [], world_size=1)
    assert "changed since" not in caplog.text


def arguments(corpus: Path, run_dir: Path) -> list[str]:
    sources = f"data.sources=[{{path: {corpus}}}]"
    return ["conf=debug", sources, f"run_dir={run_dir}", "batch.micro_rows=2", "checkpoint.every=1"]


@pytest.fixture(scope="module")
def trained(license_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps on two processes, a checkpoint after each."""
    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    pretrain(*arguments(license_corpus, run_dir), "train.steps=2", processes=2)
    return run_dir


@pytest.mark.faults
def test_the_program_falls_back_and_lives_as_if_nothing_had_been(
    trained: Path, license_corpus: Path, tmp_path: Path
) -> None:
    run_dir = shutil.copytree(trained, tmp_path / "run")
    flip(run_dir / f"checkpoints/step-2/{SHARD}")
    (run_dir / "metrics.jsonl").write_bytes((run_dir / "metrics.jsonl").read_bytes() + b"\xff\xfe rubbish")
    same = [*arguments(license_corpus, run_dir), "train.steps=2"]
    said = pretrain(*same, processes=2)
    assert f"rejected step-2: {run_dir}/checkpoints/step-2/{SHARD}: sha256 " in said
    assert "resumed from" in said
    assert "checkpoints/step-1" in said
    assert names(run_dir / "checkpoints") == ["rejected-step-2", "step-1", "step-2"]
    assert column(run_dir, "loss").tolist() == column(trained, "loss").tolist()
    again, first = tensors(run_dir / "checkpoints/step-2"), tensors(trained / "checkpoints/step-2")
    assert all((again[key] == first[key]).all() for key in first)
    for step in (1, 2):
        flip(run_dir / f"checkpoints/step-{step}/{SHARD}")
    result = launch(*same, processes=2)
    kind, facts = ending(run_dir)
    assert result.codes == [3, 3]
    assert (kind, facts["code"]) == ("FAILED", 3)
    assert all(f"step-{step}/{SHARD}: sha256" in facts["reason"] for step in (1, 2))
    assert column(run_dir, "loss").tolist() == column(trained, "loss").tolist()  # none from random weights


@pytest.mark.faults
def test_a_changed_model_is_refused_by_all_ranks(trained: Path, license_corpus: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(trained, tmp_path / "run")
    result = launch(*arguments(license_corpus, run_dir), "model.num_layers=8", "train.steps=3", processes=2)
    kind, facts = ending(run_dir)
    assert (kind, facts["code"]) == ("FAILED", 2)
    assert "model.num_layers: 4 -> 8  [model]" in facts["reason"]
    assert result.codes == [2, 2]


@pytest.mark.faults
def test_changed_data_are_refused_before_a_step_and_begin_anew_if_allowed(
    trained: Path, license_corpus: Path, tmp_path: Path
) -> None:
    run_dir, other = shutil.copytree(trained, tmp_path / "run"), tmp_path / "other"
    with DatasetWriter(other, vocab_size=512) as writer:
        for _ in range(40):
            writer.add(np.arange(200) % 512)
    same = [*arguments(other, run_dir), "train.steps=3"]
    result = launch(*same)
    assert result.returncode == 2
    assert f"changed: {other}" in result.stderr
    assert lines(run_dir) == lines(trained)
    said = pretrain(*same, "checkpoint.allow_changes=[data]")
    assert "the data are read from their start" in said
    manifest = read_manifest(run_dir / "checkpoints/step-3")
    assert manifest.part("progress")["consumed"] == {"": [8 * 129]}
    assert [record["step"] for record in lines(run_dir)] == [1, 2, 3]


def test_a_new_run_starts_from_weights(trained: Path, license_corpus: Path, tmp_path: Path) -> None:
    """On another layout, with the model of the checkpoint; after its first save it needs that no more."""
    origin, run_dir = shutil.copytree(trained, tmp_path / "origin"), tmp_path / "run"
    start = [*arguments(license_corpus, run_dir), "optimizer.lr=1e-9", f"checkpoint.init={origin}"]
    said = pretrain(*start, "model.num_layers=4", "train.steps=1", "parallel.ep=2", processes=2)
    assert "weights are those of" in said
    assert [record["step"] for record in lines(run_dir)] == [1]
    before, after = (whole(path) for path in (origin / "checkpoints/step-2", run_dir / "checkpoints/step-1"))
    assert all(torch.allclose(after[key], before[key], atol=1e-6) for key in before if "model." in key)
    assert read_manifest(run_dir / "checkpoints/step-1").part("progress")["optimizer_steps"] == 1
    shutil.rmtree(origin)
    pretrain(*start, "train.steps=2")
    assert [record["step"] for record in lines(run_dir)] == [1, 2]


SAVED_MODEL = {**asdict(config("conf=debug", SOURCES).model), "num_layers": 8, "rope_theta": 5e5}


@pytest.mark.parametrize(
    ("overrides", "conflict"),
    [
        ([], None),
        (["model.num_layers=8", "model.rope_theta=5e5"], None),
        (["model.num_layers=4"], "model.num_layers=4, not 8"),
        (["model.rope_theta=10000"], "model.rope_theta=10000.0, not 500000.0"),  # the default, but said
        (["model=debug"], "model.num_layers=4, not 8"),
    ],
)
def test_the_model_comes_from_the_checkpoint(overrides: list[str], conflict: str | None) -> None:
    """What the run file's model group says gives way; what the user says must agree."""
    said = ["run=debug", "name=debug", SOURCES, *overrides]
    register_schema()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        composed = compose("pretrain", overrides=said)
        if conflict is None:
            adopt_model(composed, said, SAVED_MODEL, Path("CKPT"))
            assert asdict(load_config(composed).model) == SAVED_MODEL
        else:
            with pytest.raises(ConfigError, match=f"comes from CKPT, which conflicts with.*{conflict}"):
                adopt_model(composed, said, SAVED_MODEL, Path("CKPT"))
        with pytest.raises(ConfigError, match="CKPT: its model is not of this version"):
            adopt_model(composed, said, {**SAVED_MODEL, "brand_new": 1}, Path("CKPT"))
        assert compose("pretrain", overrides=said).model.norm_eps == 1e-5  # defaults are back


def test_the_model_of_a_run_that_has_saved_is_its_own(tmp_path: Path) -> None:
    """checkpoint.init may be gone by then; what cannot be read is an error, not a fresh start."""
    with pytest.raises(NoCheckpointError, match=r"checkpoint\.init=gone: nothing can be read:"):
        saved_model(tmp_path, Path("gone"), Resume.auto, Verify.hash)
    folder = saved(tmp_path, 2) / "step-2"
    write(folder, {**content_of(folder), "config": {"model": {"num_layers": 3}}})
    for resume, init in ((Resume.auto, Path("gone")), (Resume.never, tmp_path)):
        assert saved_model(tmp_path, init, resume, Verify.hash) == ({"num_layers": 3}, folder)


def whole(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, put together."""
    manifest = read_manifest(folder)
    found = {name: torch.zeros(saved.shape) for name, saved in manifest.tensors.items()}
    read_boxes(manifest, {name: Box(x, tuple(x.shape), (0,) * x.dim()) for name, x in found.items()})
    return found
