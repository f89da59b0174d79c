"""The configuration as a user meets it: named runs, files, overrides, and what is refused."""

from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

from model.flops import count_parameters
from tests.support.configs import composed, config
from train.config import (
    BatchConfig,
    ConfigError,
    RunConfig,
    explain,
    load_config,
    rewrite_conf,
    run_names,
)
from train.curriculum_stages import build_stages, doubts
from train.schedule.learning_rate import DecayShape, ScheduleConfig, lr_factor


@pytest.mark.parametrize("name", run_names())
def test_every_named_run_composes_and_validates(name: str) -> None:
    cfg = config(f"conf={name}", "data.sources=[{path: somewhere}]")
    cfg.validate(1)
    assert cfg.run_dir == f"runs/{name}"
    assert count_parameters(cfg.model).total > 0


def test_named_runs_are_what_they_say() -> None:
    assert {"demo", "debug", "hybrid_2b", "minimax_text_01"} <= set(run_names())
    assert count_parameters(config("conf=minimax_text_01").model).total == 456_089_655_296
    hybrid = config("conf=hybrid_2b").model
    sizes = (hybrid.hidden_size, hybrid.num_layers, hybrid.num_heads, hybrid.head_dim, hybrid.num_kv_heads)
    assert sizes == (2048, 8, 16, 128, 4)
    assert (hybrid.num_experts, hybrid.experts_per_token, hybrid.expert_ffn_size) == (32, 2, 1408)
    assert hybrid.vocab_size == 32768


def test_precedence_defaults_file_command_line(tmp_path: Path) -> None:
    path = tmp_path / "debug.yaml"  # the same stem as a named run: the file must win
    path.write_text("defaults: [override /model: demo]\ntrain: {steps: 7}\noptimizer: {lr: 5.0e-5}\n")
    cfg = config(f"conf={path}", "optimizer.lr=1e-3", "batch.row_tokens=8", "batch.global_tokens=8")
    assert cfg.optimizer.lr == 1e-3
    assert cfg.train.steps == 7
    assert cfg.optimizer.beta2 == 0.95
    assert cfg.model.num_layers == 8
    assert cfg.model.vocab_size == 4096
    assert cfg.name == "debug"
    assert cfg.run_dir == "runs/debug"


def test_a_file_with_header_and_name_keeps_them(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("# @package _global_\nname: other\ntrain: {steps: 3}\nseed: ${train.steps}\n")
    cfg = composed(f"conf={path}")
    assert cfg.name == "other"
    assert cfg.seed == 3


def test_nothing_is_left_of_a_run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of one that runs nor of one that is refused."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    path = tmp_path / "mine.yaml"
    path.write_text("defaults: [override /model: demo]\ntrain: {steps: 3}\n")
    assert config(f"conf={path}", "batch.row_tokens=8", "batch.global_tokens=8").train.steps == 3
    path.write_text("train: {stepz: 3}\n")
    with pytest.raises(HydraException):
        composed(f"conf={path}")
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["conf=debug", "curriculum=[{name: a}]"], "curriculum=[...]: stages belong in a file"),
        ([], "conf=NAME or conf=FILE.yaml is required; named runs: ['curriculum_small'"),
        (["conf=demoo"], "conf=demoo: no such run; did you mean demo?"),
        (["conf=nowhere/x.yaml"], "conf=nowhere/x.yaml: no such file"),
        (["conf=debug", "+x=1"], "+x=1: keys are declared fields"),
        (["conf=debug", "~seed"], "~seed: keys are declared fields"),
        (["conf=debug", "-m"], "--multirun"),
        (
            ["conf=debug", "model.num_layer=2"],
            "model.num_layer: Key 'num_layer' not in 'ModelConfig'; did you mean",
        ),
        (["conf=debug", "model.num_layer=2"], "model.num_layers"),
        (["conf=debug", "lr=2"], "did you mean optimizer.lr"),
        (
            ["conf=debug", "train.steps=many"],
            "train.steps: Value 'many' of type 'str' could not be converted to I",
        ),
        (
            ["conf=debug", "train.dtype=fp16"],
            "train.dtype: Invalid value 'fp16', expected one of [bf16, fp32]",
        ),
        (["conf=debug", "model=huge"], "Could not find 'model/huge'"),
        (["conf=debug", "a=[{"], "a=[{: "),
        (["conf=debug", "optimizer.beta1=1"], "optimizer.beta1=1.0 must lie in [0, 1)"),
        (["conf=debug", "schedule.warmup_tokens=-1"], "schedule.warmup_tokens=-1 must be >= 0"),
        (["conf=debug", "checkpoint.keep=0"], "checkpoint.keep=0 must be at least 1, or null"),
        (["conf=debug", "log.every=0"], "log.every=0 must be at least 1"),
        (["conf=debug", "router.aux_loss_coefficient=-1"], "router.aux_loss_coefficient=-1.0 must be >= 0"),
        (["conf=debug", "data.sources=[{path: x, weight: 0}]"], "data.sources[0].weight=0 must be > 0"),
        (["conf=debug", "data.sources=[{weight: 1}]"], "data.sources[0] has path=None and dataset=None"),
        (["conf=debug", "train.steps=???"], "no value for train.steps"),
        (["conf=debug", "train.steps=0"], "train.steps=0 must be at least 1"),
        (["conf=debug", "data.sources=[]"], "data.sources is empty"),
        (
            ["conf=debug", "batch.global_tokens=1000"],
            "batch.global_tokens=1000 must be a multiple of batch.row_tokens",
        ),
        (["conf=debug", "batch.global_tokens=1000"], "128 * 2 * 2 = 512; the nearest is 1024"),
        (["conf=debug", "eval.every=1", "eval.rows=6"], "eval.rows=6 must be a multiple of"),
        (["conf=debug", "eval.every=1", "data.eval_fraction=0"], "set data.eval_fraction above 0"),
        (["conf=debug", "parallel.pp=3"], "their product 3 must divide the world size 2"),
        (
            ["conf=debug", "parallel.tp=2", "model.num_heads=3", "model.num_kv_heads=1"],
            "parallel.tp=2 must divide model.num_heads=3; use one",
        ),
        (
            ["conf=debug", "parallel.tp=2", "model.vocab_size=513"],
            "parallel.tp=2 must divide model.vocab_size=513",
        ),
        (
            ["conf=debug", "parallel.ep=2", "model.num_experts=7"],
            "parallel.ep=2 must divide model.num_experts=7",
        ),
        (
            ["conf=debug", "parallel.etp=2", "model.expert_ffn_size=7"],
            "parallel.etp=2 must divide model.expert_ffn",
        ),
        (
            ["conf=debug", "parallel.cp=2", "batch.row_tokens=126", "batch.global_tokens=504"],
            "2 * parallel.cp=4 must divide batch.row_tokens=126",
        ),
        (
            ["conf=debug", "parallel.pp=2", "parallel.schedule=zbv", "train.recompute=full"],
            "train.recompute=full with parallel.schedule=zbv would recompute up to four times",
        ),
        (
            ["conf=debug", "parallel.pp=2", "parallel.schedule=zigzag"],
            "Invalid value 'zigzag', expected one of",
        ),
        (["conf=debug", "parallel.pp=2", "model.num_layers=1"], "model.num_layers=1 must be at least that"),
        (
            ["conf=debug", "parallel.pp=2", "parallel.schedule=zbv", "parallel.zero_stage=3"],
            "wrong gradients in FSDP2",
        ),
        (["conf=debug", "parallel.pp=2", "batch.global_tokens=256"], "needs at least 2, not 1 micro-batches"),
        (
            ["conf=debug", "parallel.pp=2", "parallel.schedule=interleaved", "batch.global_tokens=1280"],
            "needs a multiple of 2, not 5 micro-batches",
        ),
    ],
)
def test_what_is_refused_and_how(arguments: list[str], message: str) -> None:
    """The culprit is named; on two processes."""
    with pytest.raises((ConfigError, HydraException, OmegaConfBaseException)) as caught:
        config(*arguments).validate(2)
    error = caught.value
    text = explain(error) if isinstance(error, HydraException | OmegaConfBaseException) else str(error)
    assert message in text
    assert "\n" not in text


def test_yaml_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("a: [1\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml: not valid YAML"):
        rewrite_conf([f"conf={path}"], {})
    path.write_text("just words\n")
    with pytest.raises(ConfigError, match="must hold keys and values"):
        rewrite_conf([f"conf={path}"], {})


def test_a_typo_in_a_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "typo.yaml"
    path.write_text("batch: {row_token: 8}\n")
    with pytest.raises(HydraException) as caught:
        composed(f"conf={path}")
    assert "batch.row_token" in explain(caught.value)
    assert "batch.row_tokens" in explain(caught.value)


@cache
def config_template() -> RunConfig:
    """One composed config for all examples: composing takes longer than the example."""
    return config("conf=debug")


@settings(deadline=None)  # the machine may be busy
@given(
    row_tokens=st.integers(1, 64),
    micro_rows=st.integers(1, 5),
    dp=st.integers(1, 4),  # as many experts as ranks: weights need no further cutting
    multiple=st.integers(1, 9),
    off=st.integers(0, 3),
)
def test_batch_arithmetic(row_tokens: int, micro_rows: int, dp: int, multiple: int, off: int) -> None:
    """Either the micro-batches cover the global batch exactly, or validate() names a legal size."""
    cfg = config_template()
    unit = row_tokens * micro_rows * dp
    batch = BatchConfig(row_tokens=row_tokens, micro_rows=micro_rows, global_tokens=unit * multiple + off)
    cfg = RunConfig(**{**vars(cfg), "batch": batch})
    if off % unit == 0:
        cfg.validate(dp)
        assert cfg.num_micro_batches(dp) * unit == batch.global_tokens
        return
    with pytest.raises(ConfigError, match="the nearest is") as caught:
        cfg.validate(dp)
    nearest = int(str(caught.value).rpartition(" ")[2])
    fixed = BatchConfig(row_tokens=row_tokens, micro_rows=micro_rows, global_tokens=nearest)
    RunConfig(**{**vars(cfg), "batch": fixed}).validate(dp)


def test_resolved_config_is_plain_yaml() -> None:
    from omegaconf import OmegaConf

    text = OmegaConf.to_yaml(composed("conf=debug"), resolve=True)
    assert yaml.safe_load(text)["model"]["num_layers"] == 4
    assert "${" not in text
    assert "???" not in text


@pytest.mark.parametrize("shape", list(DecayShape))
def test_schedule(shape: DecayShape) -> None:
    cfg = ScheduleConfig(warmup_tokens=100, decay_tokens=400, decay_shape=shape, min_lr_ratio=0.1)
    factors = [lr_factor(tokens, 1000, cfg) for tokens in range(10, 1001, 10)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[4] == pytest.approx(0.5)
    assert all(f == 1.0 for f in factors[9:60])
    assert factors[59] == 1.0
    assert factors[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(factors[59:]))
    middle = {"linear": 0.55, "cosine": 0.55, "exponential": 0.1**0.5}[shape]
    assert factors[79] == pytest.approx(middle)


def test_rows_of_any_length_may_be_recomputed_on_one_rank() -> None:
    sizes = ["batch.row_tokens=127", "batch.global_tokens=1016"]
    load_config(composed("conf=debug", "train.recompute=selective", *sizes)).validate(1)


def test_what_is_legal_but_seldom_meant_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """By hybrid_2b with train.steps=20, whose decay would have begun long before the run."""
    cfg = load_config(composed("conf=hybrid_2b", "train.steps=20", "model.experts_per_token=1"))
    decay, gate = doubts(build_stages(cfg))
    tokens = 20 * cfg.batch.global_tokens
    assert decay.startswith(
        f"schedule.decay_tokens={cfg.schedule.decay_tokens} is more than the run's {tokens}"
    )
    assert gate.startswith("model.experts_per_token=1: ")
    assert doubts(build_stages(load_config(composed("conf=hybrid_2b")))) == []


def test_warm_up_may_outlast_the_run() -> None:
    cfg = ScheduleConfig(warmup_tokens=10_000)
    assert [lr_factor(t, 1000, cfg) for t in (500, 1000)] == [0.05, 0.1]
