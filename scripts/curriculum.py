"""List the stages of a run: steps, tokens, row length, batch, learning rate, mixture, layout, checkpoints."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from scripts.reporting.charts import number
from train.config import CONF_DIR, ConfigError, RunConfig, explain, load_config, register_schema, rewrite_conf
from train.curriculum_stages import CurriculumStage, build_stages, tokens_at, total_steps

COLUMNS = (
    "stage", "steps", "from step", "tokens", "row", "RoPE base", "batch", "learning rate", "mixture",
    "layout", "saves",
)  # fmt: skip


def size(number: int) -> str:
    """Format a power of two, of rows and batches: 1024 -> 1Ki."""
    power, unit = next((p for p in ((2**20, "Mi"), (2**10, "Ki")) if number % p[0] == 0), (1, ""))
    return f"{number // power}{unit}"


def line(stage: CurriculumStage, stages: list[CurriculumStage]) -> list[str]:
    """Return the cells of the table for one stage."""
    cfg, end = stage.cfg, min(stage.end_step, total_steps(stages))
    total = tokens_at(stages, total_steps(stages))
    first, last = stage.first_step + 1, end
    rates = [
        stage.lr_at(stage.first_tokens + (step - stage.first_step) * cfg.batch.global_tokens, total)
        for step in (first, last)
    ]
    degrees = {axis: getattr(cfg.parallel, axis) for axis in ("pp", "cp", "tp", "ep", "etp")}
    layout = " ".join(f"{axis}{degree}" for axis, degree in degrees.items() if degree > 1) or "-"
    every = cfg.checkpoint.every
    saves = "end" if every is None else f"{last // every - stage.first_step // every}"
    return [
        stage.name or "whole run", f"{end - stage.first_step:,}", f"{first:,}",
        number((end - stage.first_step) * cfg.batch.global_tokens), size(cfg.batch.row_tokens),
        number(cfg.model.rope_theta), size(cfg.batch.global_tokens), f"{rates[0]:.2e} .. {rates[1]:.2e}",
        mixture(stage), layout, saves,
    ]  # fmt: skip


def mixture(stage: CurriculumStage) -> str:
    """Describe weights and length shares, and what changes inside the stage."""
    own, settings = stage.own, stage.settings
    parts = [":".join(f"{weight:g}" for weight in own.weights)] if own.weights else []
    if own.length_shares is not None:
        parts.append("lengths " + "/".join(f"{100 * share:.3g}" for share in own.length_shares) + "%")
    if settings is not None and settings.transition_tokens:
        parts.append(f"over {number(settings.transition_tokens)}")
    if settings is not None and settings.final_weights:
        final = ":".join(f"{weight:g}" for weight in settings.final_weights)
        parts.append(f"last {100 * settings.final_fraction:g}% {final}")
    return ", ".join(parts) or "as it comes"


def read_config(argv: list[str]) -> RunConfig:
    """Resolve the configuration as `train/pretrain.py` would from the same arguments.

    Raises:
        ConfigError: as there.
    """
    register_schema()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        try:
            args = rewrite_conf(argv, os.environ)
            # The name's resolver exists in a Hydra job only.
            names = [f"name={arg[4:]}" for arg in args if arg.startswith("run=")]
            return load_config(compose("pretrain", [*args, *names]))
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(explain(error)) from error


def main(argv: list[str] | None = None) -> int:
    """Print the table; exit code 2 for what cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="conf=NAME_OR_PATH key=value ...")
    try:
        stages = build_stages(read_config(parser.parse_args(argv).overrides))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    reached = [stage for stage in stages if stage.first_step < total_steps(stages)]
    rows = [list(COLUMNS), *(line(stage, stages) for stage in reached)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
