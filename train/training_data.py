"""The training data of a run and its held-out rows."""

import logging
import time
from collections.abc import Callable
from typing import Any

from data.config import DataConfig
from data.dataset import TokenDataset
from data.loader import Loader, Shape
from data.materialise import materialise
from data.mixture import Mixture
from data.packing import Batch
from data.prefetch import Prefetcher
from parallel.collectives import from_leader
from parallel.mesh import Mesh
from train.config import RunConfig
from train.curriculum_stages import CurriculumStage, naming, stage_of, tokens_at
from train.guard.signals import StopRequest

log = logging.getLogger(__name__)

BEAT_SECONDS = 30


def build_data(
    stages: list[CurriculumStage], stage: CurriculumStage, mesh: Mesh, stop: StopRequest
) -> tuple[Prefetcher, Callable[[RunConfig], list[Batch]]]:
    """Open the training data of all curriculum stages; also return a function that reads held-out rows."""
    cfg = stage.cfg
    datasets = [TokenDataset(prefix) for prefix in find_tokens(cfg.data, mesh, stop)]
    where: dict[str, Any] = {"rank": mesh.dp.rank, "size": mesh.dp.size, "vocab_size": cfg.model.vocab_size}

    def plan(number: int) -> tuple[Shape, Mixture]:
        at = stage_of(stages, number)
        batch = at.cfg.batch
        rows = batch.global_tokens // batch.row_tokens
        return Shape(batch.row_tokens, rows, batch.micro_rows), at.mixture_at(tokens_at(stages, number))

    def held_out(cfg: RunConfig) -> list[Batch]:
        shape = Shape(cfg.batch.row_tokens, cfg.eval.rows, cfg.batch.micro_rows)
        return Loader(datasets, cfg.data, split="eval", shape=shape, seed=0, **where).next_step()

    if cfg.eval.every is not None:
        held_out(cfg)  # an empty split is an error now, not at the first evaluation
    shape, _ = plan(stage.first_step)
    buckets = any(one.own.length_shares is not None for one in stages)
    loader = Loader(datasets, cfg.data, split="train", shape=shape, seed=cfg.seed, buckets=buckets, **where)
    for one in stages:
        with naming(one.name):
            if one.cfg.parallel == cfg.parallel:  # else its shape is for another number of ranks
                loader.check(plan(one.first_step)[0], one.own)
            for mixture in (one.mixture_at(one.first_tokens), one.own, one.last):
                loader.check_mixture(mixture)
    return Prefetcher(loader, plan, step=stage.first_step, device=mesh.device), held_out


def find_tokens(cfg: DataConfig, mesh: Mesh, stop: StopRequest) -> list[str]:
    """Find the prefixes of the sources' token files; rank 0 tokenizes what is missing, the others wait.

    Raises:
        ValueError: text or tokenizer cannot be used; the same on every rank.
        StoppedEarly: a rank was asked to stop meanwhile; on every rank.
    """
    when, beat = "while text was tokenized", time.monotonic()

    def progress(documents: int) -> None:
        nonlocal beat
        if stop.is_set or time.monotonic() > beat + BEAT_SECONDS:
            log.info("tokenized %d documents", documents)
            from_leader(None, mesh.world)  # so that no rank takes a long wait for a dead leader
            stop.leave_early(mesh.world, when)
            beat = time.monotonic()

    result: tuple[list[str], str | None] | None = None
    if mesh.rank == 0:
        try:
            result = [materialise(cfg, i, progress) for i in range(len(cfg.sources))], None
        except ValueError as error:
            result = [], str(error)
    while (heard := from_leader(result, mesh.world)) is None:
        stop.leave_early(mesh.world, when)
    prefixes, problem = heard
    if problem is not None:
        raise ValueError(problem)
    return prefixes
