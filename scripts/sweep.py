"""Submit one Slurm job for each combination of values.

Example: scripts/sweep.py conf=NAME optimizer.lr=1e-4,2e-4 seed=1,2 -- --nodes=2
Each configuration is composed and checked before the first job is submitted.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import itertools
import re
import shlex
import subprocess
from collections import Counter
from typing import NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from scripts.curriculum import read_config
from train.checkpoint.contents import Resume
from train.config import ConfigError, explain
from train.curriculum_stages import build_stages, validate_stages
from train.guard.signals import Ending

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "scripts/slurm/pretrain.sbatch"
NAME_LENGTH = 200  # of 255 that file systems take


class Member(NamedTuple):
    """One job of a sweep."""

    name: str
    """Of its run directory: the keys that vary, and their values."""
    overrides: list[str]


def expand(overrides: list[str]) -> list[Member]:
    """Every combination of the values that Hydra's own grammar reads: `a,b`, `choice(a,b)`, `range(1,5)`.

    Raises:
        ConfigError: what the grammar refuses, run_dir=, or two members of one name.
    """
    choices: list[list[tuple[str, str]]] = []  # of each override: (its part of the name or "", the override)
    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
            if override.key_or_group == "run_dir":
                raise ConfigError(f"{text}: each job has a run_dir of its own; name their folder by --folder")
            choices.append(values(override) if override.is_sweep_override() else [("", text)])
        except HydraException as error:
            raise ConfigError(f"{text}: {explain(error)}") from error
    members = []
    for combination in itertools.product(*choices):
        varied = "_".join(part for part, _ in combination if part)
        members.append(Member(file_name(varied or "single"), [text for _, text in combination]))
    for name, count in Counter(member.name for member in members).items():
        if count > 1:
            raise ConfigError(f"{count} jobs would write to {name}; give each value once")
    return members


def values(override: Override) -> list[tuple[str, str]]:
    """Of each value of a sweep, its part of the name and the override."""
    if not (override.is_choice_sweep() or override.is_range_sweep()):
        raise ConfigError(f"{override.input_line}: use a list of values a,b,c or range(start,stop)")
    key = override.key_or_group
    return [(f"{key}-{value}", f"{key}={value}") for value in override.sweep_string_iterator()]


def file_name(text: str) -> str:
    """Letters, digits, `.`, `_` and `-` alone: neither a shell nor Hydra wants quotes for it."""
    name = re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-")
    if len(name) > NAME_LENGTH:
        raise ConfigError(f"the run directory's name {name!r} is longer than {NAME_LENGTH}; vary fewer keys")
    return name


def check(member: Member, processes: int | None) -> None:
    """Compose a member's configuration; check its layout where the number of processes is given.

    Raises:
        ConfigError: as in training, with the name of the member.
    """
    try:
        cfg = read_config(member.overrides)
        if cfg.checkpoint.resume is Resume.never:
            raise ConfigError("checkpoint.resume=never would begin again at each requeue; use --folder")
        stages = build_stages(cfg)
        if processes is not None:
            validate_stages(stages, processes)
    except ConfigError as error:
        raise ConfigError(f"{member.name}: {error}; nothing was submitted") from error


def submit(members: list[Member], folder: str, options: list[str], *, dry_run: bool) -> None:
    """Submit, or with dry_run print, a job for each member that has not finished.

    Raises:
        ConfigError: sbatch is missing or refuses a job; says how many were submitted before.
    """
    for number, member in enumerate(members):
        run_dir = f"{folder}/{member.name}"
        if (ROOT / run_dir / Ending.DONE).exists():
            print(f"finished: {run_dir}")
            continue
        name = f"--job-name={Path(folder).name}/{member.name}"
        command = ["sbatch", "--parsable", *options, name, SCRIPT, *member.overrides, f"run_dir={run_dir}"]
        if dry_run:
            print(shlex.join(command))
            continue
        try:
            result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            raise ConfigError(f"sbatch, after {number} of {len(members)} jobs: {said.strip()}") from error
        print(f"job {result.stdout.strip().partition(';')[0]}: {run_dir}")


def main(argv: list[str] | None = None) -> int:
    """Check all, then submit all; exit code 2 for what cannot be."""
    arguments = sys.argv[1:] if argv is None else argv
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides", nargs="+", metavar="KEY=VALUE", help="conf=NAME, key=a,b; after --: options of sbatch"
    )
    parser.add_argument("--folder", default="runs/sweep", help="holds the runs (default: %(default)s)")
    parser.add_argument("--processes", type=int, metavar="N", help="of each job; checks the layout, too")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, submit nothing")
    args = parser.parse_args(arguments[:split])
    try:
        if Path.cwd() != ROOT:
            raise ConfigError(f"run it from the repository root, {ROOT}")
        members = expand(args.overrides)
        for member in members:
            check(member, args.processes)
        submit(members, args.folder, arguments[split + 1 :], dry_run=args.dry_run)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
