"""Compares the configuration of a checkpoint with that of the run that goes on from it."""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from train.checkpoint.contents import Change
from train.checkpoint.manifest import Manifest, show
from train.config import ConfigError
from train.curriculum_stages import CurriculumStage, stage_of

log = logging.getLogger(__name__)

ABSENT = object()
MODEL = "model"
LINES = 40
"""Most differences that are listed."""
RULES: list[tuple[str, str | None]] = [  # of the key; the first that matches holds, None is for information
    (r"model\..*|router\.balancing", MODEL),
    (r"optimizer\.(offload|implementation)", None),
    (r"optimizer\..*|router\..*|batch\.(row_tokens|global_tokens)", Change.optimizer),
    (r"data\.(cache_dir|tokenizer|window)", None),
    (r"data\.sources\.\d+\.(path|dataset|split|text_key|max_documents|max_epochs)", None),
    (r"data\..*|seed", Change.data),
    (r"curriculum\.\d+\.rope_theta", MODEL),
    (r"curriculum\.\d+\.(lr|lr_end|lr_shape|tokens|row_tokens|global_tokens)", Change.optimizer),
    (r"curriculum\.\d+\.(weights|length_shares|transition_tokens|final_\w+)(\.\d+)?", Change.data),
]


class Difference(NamedTuple):
    """A key that has another value than it had."""

    key: str
    """Path of the key in the configuration."""
    saved: object
    """Value in the checkpoint, or ABSENT."""
    now: object
    """Value of the run, or ABSENT."""
    kind: str | None
    """MODEL or the `Change` that must be allowed; None = the change needs no permission."""

    def __str__(self) -> str:
        """Print the difference as one line."""
        words = ["(none)" if value is ABSENT else show(value) for value in (self.saved, self.now)]
        return f"{self.key}: {words[0]} -> {words[1]}" + (f"  [{self.kind}]" if self.kind else "")


def judge_changes(
    manifest: Manifest, stages: Sequence[CurriculumStage], allowed: Sequence[Change], *, world_size: int
) -> None:
    """Print what has changed since a checkpoint; stages that have not begun may change freely.

    Raises:
        ConfigError: the model has changed, or without being allowed optimizer or data; on every rank.
    """
    last = stage_of(stages, max(0, manifest.step - 1))  # the one whose configuration was saved
    found = compare(manifest.config, json.loads(json.dumps(asdict(last.cfg))), begun=last.number)
    for difference in found[:LINES]:
        log.info("changed since %s: %s", manifest.folder.name, difference)
    rows = last.cfg.pool_rows(world_size)
    if (before := manifest.facts.get("pool_rows", rows)) != rows:
        log.info(
            "changed since %s: batch.micro_rows * dp: %d -> %d: capacity and aux loss are taken over other "
            "rows, so drops and loss differ from those of the run at %d",
            manifest.folder.name, before, rows, before,
        )  # fmt: skip
    refused = [each for each in found if each.kind is not None and each.kind not in allowed]
    if not refused:
        return
    kinds = sorted({each.kind for each in refused if each.kind is not None})
    remedy = f"checkpoint.allow_changes=[{','.join(kinds)}] accepts it"
    if MODEL in kinds:
        remedy = f"checkpoint.init={manifest.folder} with another run_dir starts a new run from its weights"
    listed = "".join(f"\n  {each}" for each in refused[:LINES])
    raise ConfigError(
        f"{manifest.folder} was saved with another configuration:{listed}\nchange it back; {remedy}"
    )


def compare(saved: Mapping[str, Any], now: Mapping[str, Any], *, begun: int) -> list[Difference]:
    """List the keys whose values differ, between a checkpoint's configuration and the run's.

    A field that one side lacks is of another version, and no difference; `begun` is the number of the last
    curriculum stage that has begun.
    """
    old, new = dict(_leaves(saved)), dict(_leaves(now))
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, ABSENT), new.get(key, ABSENT)
        in_list = re.search(r"\.\d+(\.|$)", key)
        if before == after or (not in_list and ABSENT in (before, after)):
            continue
        kind = next((kind for rule, kind in RULES if re.fullmatch(rule, key)), None)
        stage = re.match(r"curriculum\.(\d+)\.", key)
        is_ahead = stage is not None and int(stage[1]) > begun
        found.append(Difference(key, before, after, None if is_ahead else kind))
    return found


def _leaves(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """List key, as `a.b.0.c`, and value of everything that is neither an object nor a list of some."""
    items: list[tuple[object, object]]
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
        items = [(str(n), each) for n, each in enumerate(value)]
    else:
        yield key, value
        return
    for name, each in items:
        yield from _leaves(each, f"{key}.{name}" if key else str(name))
