"""Pretrain a model: `torchrun train/pretrain.py conf=NAME_OR_FILE [key=value ...]`, or plain python."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # import from the repository root, not from train/

import os
from typing import NoReturn

os.environ["HYDRA_FULL_ERROR"] = "1"  # let Hydra's errors through: explain() says them in one line

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import record

from parallel.collectives import from_leader
from parallel.launch import (
    JoinError,
    join_job,
    launch_name,
    launched_local_rank,
    launched_rank,
    launched_world_size,
    leave_job,
    set_determinism,
    slurm_job,
)
from parallel.mesh import init_mesh
from train.build import build_run, device_type
from train.changes import judge_changes
from train.checkpoint.resume import NoCheckpointError, choose_start, saved_model
from train.checkpoint.rewind import set_newer_aside
from train.checkpoint.storage import sweep
from train.config import (
    ConfigError,
    RunConfig,
    adopt_model,
    explain,
    load_config,
    register_schema,
    rewrite_conf,
)
from train.curriculum_stages import build_stages, stage_of, validate_stages
from train.guard.lock import RunLock, lock_holder, take_lock
from train.guard.signals import EXIT_CODES, Ending, StoppedEarly, StopRequest, clear_sentinels, write_sentinel
from train.guard.watchdog import Watchdog
from train.loop import train
from train.monitor.log import set_up_logging


@hydra.main(version_base="1.3", config_path="../conf", config_name="pretrain")
def main(composed: DictConfig) -> None:
    """Compose the configuration, check it, run it."""
    try:
        if composed.checkpoint.init is not None:
            saving = composed.checkpoint
            found = saved_model(Path(composed.run_dir), Path(saving.init), saving.resume, saving.verify)
            adopt_model(composed, HydraConfig.get().overrides.task, *found)
        cfg = load_config(composed)
    except (ConfigError, NoCheckpointError) as error:
        fail(Path(composed.run_dir), str(error), 3 if isinstance(error, NoCheckpointError) else 2)
    sys.exit(record(run_to_end)(cfg, OmegaConf.to_yaml(composed, resolve=True)))


def run_to_end(cfg: RunConfig, resolved: str) -> int:
    """Build the run, train, write to the run directory how it ended; return the exit code."""
    console = Console(stderr=False)
    set_up_logging(launched_rank(), console)
    run_dir, leader = Path(cfg.run_dir), launched_rank() == 0
    try:
        lock = take_lock(run_dir, launch_name(), slurm_job()) if leader else RunLock(None)
        stages = build_stages(cfg)
        validate_stages(stages, launched_world_size())
        if lock.file is not None:
            sweep(run_dir / "checkpoints")  # before any rank looks there: they wait for the lock's answer
        device = device_type(cfg.train.device)
        stop = StopRequest().install()
        set_determinism(cfg.train.deterministic)
        world = join_job(device)
        if problem := from_leader(lock.refusal(run_dir), world):
            raise ConfigError(problem)
        if refusal := from_leader(set_newer_aside(run_dir, cfg.rewind) if leader else None, world):
            raise ConfigError(refusal)
        start = choose_start(run_dir, cfg.checkpoint, world, stop)
        stage = stage_of(stages, start.step)
        if start.resumed is not None:
            judge_changes(start.resumed, stages, cfg.checkpoint.allow_changes, world_size=world.size)
        mesh = init_mesh(
            stage.cfg.parallel, device, pool_groups=stage.cfg.pool_groups(world.size),
            overlaps=cfg.moe.overlap_groups > 1,
        )  # fmt: skip
        if leader:
            clear_sentinels(run_dir)
            (run_dir / "config.yaml").write_text(resolved, encoding="utf-8")
        watchdog = Watchdog(mesh.rank)
        with watchdog.section("setup", cfg.health.setup_timeout_s):
            run = build_run(stages, stage, start, mesh, stop, watchdog, console)
        ending, reason = train(run)
        run.saver.wait()
    except StoppedEarly as early:
        return end_early(run_dir, str(early))
    except (ConfigError, NoCheckpointError) as error:
        fail(run_dir, str(error), 3 if isinstance(error, NoCheckpointError) else 2)
    if run.metrics is not None:
        run.metrics.close()
    if leader:
        write_sentinel(run_dir, ending, code=EXIT_CODES[ending], step=run.progress.step, reason=reason)
    leave_job()
    return EXIT_CODES[ending]


def end_early(run_dir: Path, reason: str) -> int:
    """Write that the run wants to go on, with no step taken; return the exit code, on every rank."""
    if launched_rank() == 0:
        write_sentinel(run_dir, Ending.REQUEUE, code=EXIT_CODES[Ending.REQUEUE], step=None, reason=reason)
    leave_job()
    return EXIT_CODES[Ending.REQUEUE]


def fail(run_dir: Path, message: str, code: int) -> NoReturn:
    """Write the failure to the run directory, unless another job works there, and end, on every rank."""
    leave_job()
    if not lock_holder(run_dir, launch_name()):
        write_sentinel(run_dir, Ending.FAILED, code=code, step=None, reason=message)
    refuse(message, code)


def refuse(message: str, code: int) -> NoReturn:
    """End with one message a machine: every rank of it met the same error."""
    if launched_local_rank() == 0:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    try:
        sys.argv[1:] = rewrite_conf(sys.argv[1:], os.environ)
        register_schema()
        main()
    except ConfigError as error:
        refuse(str(error), 2)
    except (HydraException, OmegaConfBaseException) as error:
        refuse(explain(error), 2)
    except JoinError as error:
        refuse(str(error), 1)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the end of the interpreter with an open process group may abort, or wait for peers
