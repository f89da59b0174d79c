"""The configuration of a run: dataclasses of all parts, composed by Hydra, checked before any allocation.

Invariant: nothing changes a config after `load_config`; what is derived is a property or a function of it.
"""

import difflib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from pathlib import Path

import yaml
from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from data.config import DataConfig
from model.config import ModelConfig, RouterConfig
from parallel.config import MoEConfig, ParallelConfig, Recompute
from parallel.layout import check_layout
from parallel.optimizer import OptimizerConfig
from train.checkpoint.contents import CheckpointConfig, Resume
from train.checkpoint.rewind import RewindConfig
from train.guard.spikes import HealthConfig, Rerun
from train.monitor.event_files import TensorboardConfig
from train.monitor.metrics import LogConfig
from train.monitor.tracing import ProfileConfig
from train.monitor.wandb_run import WandbConfig
from train.schedule.curriculum import CurriculumStageConfig
from train.schedule.learning_rate import ScheduleConfig

CONF_DIR = Path(__file__).resolve().parents[1] / "conf"


class ConfigError(ValueError):
    """The user's configuration or data cannot be used; the text says what, why and what could."""


@contextmanager
def user_errors(where: str = "") -> Iterator[None]:
    """Turn a ValueError into a ConfigError: it concerns what the user gave, in the part `where`."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, ConfigError) and not where:
            raise
        raise ConfigError(f"{where}{error}") from error


Precision = StrEnum("Precision", ["bf16", "fp32"])
"""What the model computes in; masters, moments and reductions are fp32."""
Device = StrEnum("Device", ["auto", "cpu", "cuda"])
"""Where to compute."""


@dataclass(kw_only=True)
class BatchConfig:
    """Sizes of a batch, in rows and input tokens."""

    row_tokens: int = MISSING
    """Tokens of a packed row: the context length."""
    micro_rows: int = 1
    """Rows that a data-parallel rank runs at once."""
    global_tokens: int = MISSING
    """Tokens of an optimizer step."""


@dataclass(kw_only=True)
class TrainConfig:
    """How long and in which arithmetic."""

    steps: int | None = None
    """Optimizer steps of the whole run; null = to the curriculum's end."""
    dtype: Precision = Precision.bf16
    """What the model computes in."""
    recompute: Recompute = Recompute.none
    """What blocks compute again in backward instead of keeping it."""
    deterministic: bool = False
    """Only kernels that give the same bits every time."""
    device: Device = Device.auto
    """auto: a GPU where there is one."""


@dataclass(kw_only=True)
class EvalConfig:
    """Loss on the held-out documents."""

    every: int | None = None
    """Steps between evaluations; null = never."""
    rows: int = 8
    """Rows of each evaluation, the same every time."""


@dataclass(kw_only=True)
class RunConfig:
    """Everything that a run depends on."""

    name: str = MISSING
    """Name of the run; the conf= name unless given."""
    run_dir: str = MISSING
    """Where the run writes; runs/NAME unless given."""
    seed: int = 0
    """Seed of initial weights and data order."""
    model: ModelConfig = MISSING
    router: RouterConfig = field(default_factory=RouterConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    curriculum: list[CurriculumStageConfig] = field(default_factory=list)
    """Stages, one after the other; none = one stage of train.steps."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    rewind: RewindConfig = field(default_factory=RewindConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: TensorboardConfig = field(default_factory=TensorboardConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def num_micro_batches(self, dp: int) -> int:
        """Count the micro-batches of a step on each of dp data-parallel ranks."""
        return self.batch.global_tokens // (self.batch.row_tokens * self.batch.micro_rows * dp)

    def pool_rows(self, world_size: int) -> int:
        """Count a micro-batch's rows on all dp ranks: those over which capacity and aux loss are taken."""
        return self.batch.micro_rows * self.parallel.dp(world_size)

    def pool_groups(self, world_size: int) -> int:
        """Count the EP groups that share their experts' capacity."""
        return self.router.groups_in_pool(self.parallel.edp(world_size))

    def validate(self, world_size: int) -> None:
        """Check what concerns several parts or the world size.

        Raises:
            ConfigError: with key, value, rule and remedy.
        """
        with user_errors():
            dp = self.parallel.dp(world_size)
            edp = self.parallel.edp(world_size)
            self.pool_groups(world_size)
        positive = {
            "batch.row_tokens": self.batch.row_tokens,
            "batch.micro_rows": self.batch.micro_rows,
            "batch.global_tokens": self.batch.global_tokens,
            "train.steps": 1 if self.train.steps is None else self.train.steps,
            "eval.every": 1 if self.eval.every is None else self.eval.every,
            "eval.rows": self.eval.rows,
        }
        for key, value in positive.items():
            if value < 1:
                raise ConfigError(f"{key}={value} must be at least 1")
        if self.rewind.to is not None and self.checkpoint.resume is Resume.never:
            raise ConfigError(
                f"rewind.to={self.rewind.to} needs a checkpoint; checkpoint.resume=never must be auto or must"
            )
        is_repeatable = self.train.deterministic or self.train.device is Device.cpu
        if self.health.rerun is Rerun.on_suspicion and not is_repeatable:
            raise ConfigError(
                f"health.rerun={self.health.rerun} compares bits, which a GPU repeats only with "
                "train.deterministic=true; set it, or train.device=cpu, or health.rerun=never"
            )
        if not self.data.sources:
            raise ConfigError("data.sources is empty; give at least one {path: PREFIX, weight: 1.0}")
        rows, unit = self.batch.micro_rows * dp, self.batch.row_tokens * self.batch.micro_rows * dp
        if self.batch.global_tokens % unit:
            nearest = max(1, round(self.batch.global_tokens / unit)) * unit
            raise ConfigError(
                f"batch.global_tokens={self.batch.global_tokens} must be a multiple of batch.row_tokens * "
                f"batch.micro_rows * dp = {self.batch.row_tokens} * {self.batch.micro_rows} * {dp} = {unit}; "
                f"the nearest is {nearest}"
            )
        with user_errors():
            check_layout(
                self.model, self.parallel, self.train.recompute, dp=dp, edp=edp,
                row_tokens=self.batch.row_tokens, num_micro=self.num_micro_batches(dp),
            )  # fmt: skip
        if self.eval.every is not None and self.eval.rows % rows:
            nearest = -(-self.eval.rows // rows) * rows
            raise ConfigError(
                f"eval.rows={self.eval.rows} must be a multiple of batch.micro_rows * dp = {rows}; "
                f"use {nearest}"
            )
        if self.eval.every is not None and self.data.eval_fraction == 0:
            raise ConfigError("eval.every needs held-out documents; set data.eval_fraction above 0")


def register_schema() -> None:
    """Tell Hydra the types of all keys; conf/pretrain.yaml begins with them."""
    ConfigStore.instance().store(name="schema", node=RunConfig)


def load_config(composed: DictConfig) -> RunConfig:
    """Turn the composed configuration into dataclasses, interpolations resolved.

    Raises:
        ConfigError: a value is missing or out of its range.
    """
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"no value for {', '.join(missing)}; set it in the run file or on the command line")
    try:
        cfg = OmegaConf.to_object(composed)
    except ValueError as error:
        if isinstance(error, OmegaConfBaseException):
            raise
        raise ConfigError(str(error)) from error
    assert isinstance(cfg, RunConfig)
    return cfg


def adopt_model(
    composed: DictConfig, overrides: Sequence[str], model: Mapping[str, object], origin: Path
) -> None:
    """Give a composed configuration the model of a checkpoint; a run file's `override /model` gives way.

    Raises:
        ConfigError: a model.KEY that was given says otherwise, or the checkpoint has unknown ones.
    """
    store, blank = ConfigStore.instance(), OmegaConf.structured(RunConfig)
    blank.model = OmegaConf.structured(ModelConfig)
    for item in fields(ModelConfig):
        blank.model[item.name] = MISSING
    chosen = [] if any(override.startswith("model=") for override in overrides) else ["model=of_checkpoint"]
    try:
        store.store(name="schema", node=blank)  # without defaults: what has a value was given
        store.store(group="model", name="of_checkpoint", node={})
        said = compose("pretrain", overrides=[*overrides, *chosen]).model
    finally:
        register_schema()
    try:
        adopted = OmegaConf.merge(OmegaConf.structured(ModelConfig), model)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{origin}: its model is not of this version: {error}".splitlines()[0]) from error
    given = {key: said[key] for key in said if not OmegaConf.is_missing(said, key)}
    wrong = [f"model.{key}={given[key]}, not {adopted[key]}" for key in given if adopted[key] != given[key]]
    if wrong:
        raise ConfigError(f"the model comes from {origin}, which conflicts with {'; '.join(wrong)}")
    composed.model = adopted


def rewrite_conf(argv: list[str], env: Mapping[str, str]) -> list[str]:
    """Turn `conf=NAME` into `run=NAME`, and so `conf=FILE.yaml`, whose content Hydra is given.

    Raises:
        ConfigError: no conf=, an unknown name, an added or deleted key, or --multirun.
    """
    args: list[str] = []
    for arg in argv:
        key, _, value = arg.partition("=")
        if key == "conf" and value.endswith(".yaml"):
            args.append(f"run={register_run_file(Path(value))}")
        elif key == "conf":
            if value not in run_names():
                raise ConfigError(
                    f"conf={value}: no such run{_suggest(value, run_names())}; there are {run_names()}"
                )
            args.append(f"run={value}")
        elif key == "curriculum" and value.startswith("["):
            raise ConfigError(
                "curriculum=[...]: stages belong in a file; use curriculum=NAME or conf=FILE.yaml"
            )
        elif key.startswith(("+", "~")) and not key.lstrip("+~").startswith("hydra"):
            raise ConfigError(f"{arg}: keys are declared fields; adding or deleting one is refused")
        else:
            args.append(arg)
    if {"-m", "--multirun"} & set(argv):
        raise ConfigError("--multirun would run all jobs in one process group; start one process group a job")
    if not any(
        arg.startswith(("conf=", "--help", "-h", "--hydra-help", "--info", "--version")) for arg in argv
    ):
        raise ConfigError(f"conf=NAME or conf=FILE.yaml is required; named runs: {run_names()}")
    if {"--cfg", "-c"} & set(argv) and "--resolve" not in argv:
        args.append("--resolve")
    # argparse wants all overrides in one piece
    return sorted(args, key=lambda arg: arg.startswith("-") or "=" not in arg)


def run_names() -> list[str]:
    """List the names that conf= accepts."""
    root = CONF_DIR / "run"
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def register_run_file(path: Path) -> str:
    """Make any YAML file selectable as a run; return its name, which no file of conf/run can have.

    Raises:
        ConfigError: no file, or none of keys and values.
    """
    if not path.is_file():
        raise ConfigError(f"conf={path}: no such file")
    text = path.read_text(encoding="utf-8")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"conf={path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"conf={path}: must hold keys and values")
    node = OmegaConf.create(text)
    if "name" not in node:
        node.name = path.stem
    name = f"file-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    ConfigStore.instance().store(group="run", name=name, node=node, package="_global_")
    return name


def explain(error: HydraException | OmegaConfBaseException) -> str:
    """Say in one line what is wrong, at which key, and which keys resemble it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    if not isinstance(cause, OmegaConfBaseException):
        culprit = f"{error.override}: " if isinstance(error, OverrideParseException) else ""
        return culprit + " ".join(str(error).split())
    key = str(cause.full_key or "")
    text = f"{key}: {str(cause).splitlines()[0]}"
    is_unknown = isinstance(cause, ConfigKeyError | ConfigAttributeError)
    return text + _suggest(key, _all_keys(RunConfig)) if is_unknown else text


def _suggest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` or nothing."""
    known = list(known)
    leaf = name.rpartition(".")[2]
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.7)
    close += [key for key in known if key.rpartition(".")[2] == leaf and key not in close][:2]
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _all_keys(config_class: type, prefix: str = "") -> Iterator[str]:
    for item in fields(config_class):
        yield prefix + item.name
        if isinstance(item.type, type) and is_dataclass(item.type):
            yield from _all_keys(item.type, f"{prefix}{item.name}.")
