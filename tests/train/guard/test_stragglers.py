"""The rank that keeps the others waiting is named, with the section."""

import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.support.forked import run_forked
from tests.support.runs import lines
from train.guard.spikes import HealthConfig
from train.guard.stragglers import Section, SectionClock, Slow, find_slow

WHERE = {
    "data": ("data.prefetch", "Prefetcher", "next_step"),
    "forward and backward": ("model.transformer", "Block", "forward"),
}


@pytest.mark.parametrize("section", WHERE)
def test_the_slow_rank_and_section_are_named(section: str, license_corpus: Path, tmp_path: Path) -> None:
    """Rank 2 of 3 sleeps 0.4 s a step, in the forward pass a quarter of it in each block."""
    module, owner, name = WHERE[section]

    def fault(rank: int) -> None:
        if rank == 2:
            kind = getattr(import_module(module), owner)
            real, pause = getattr(kind, name), 0.4 if section == "data" else 0.1

            def late(self: Any, *args: Any, **kwargs: Any) -> Any:
                time.sleep(pause)
                return real(self, *args, **kwargs)

            setattr(kind, name, late)

    ended = run_forked(
        tmp_path, f"data.sources=[{{path: {license_corpus}}}]", "train.steps=4", "log.every=4",
        "batch.global_tokens=768", processes=3, fault=fault,
    )  # fmt: skip
    assert ended.codes == [0, 0, 0], ended.said
    last = lines(tmp_path)[-1]
    assert last["step"] == 4
    assert last["slow_score"] < 0.75
    assert f"step 4: rank 2 is slow in {section}: score " in ended.said[0]
    assert not any("is slow in" in said for said in ended.said[1:])


def test_the_clock_starts_anew_with_each_reading() -> None:
    """It has the work inside a section, and all the time since the reading before."""
    clock = SectionClock(watches=True)

    def work() -> None:
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            pass

    with clock.section(Section.compute):
        work()
    work()
    first, second = clock.read(), clock.read()
    assert first[0] == first[2] == 0
    assert first[3] >= 0.4
    assert 0 < first[1] <= first[3] - 0.15
    assert second[1] < first[1]
    assert second[3] < 0.2


def test_scores_compare_ranks_of_a_stage() -> None:
    """Stages have other work; what is less than a twentieth of the time is noise."""
    first, second = [0.1, 1.0, 0.2, 2.0], [0.1, 4.0, 0.2, 5.0]
    assert len(first) == len(Section) + 1
    assert find_slow([first, first, second, second], stages=2, limit=0.75) == []
    late = [0.1, 2.0, 0.2, 3.0]
    found = find_slow([first, first, late, second, second, second], stages=2, limit=0.75)
    assert found == [Slow(2, Section.compute, 0.5)]
    assert find_slow([first, late], stages=1, limit=0.75) == [Slow(1, Section.compute, 0.5)]
    found = find_slow([first, first, second, [0.1, 9.0, 0.2, 9.5]], stages=2, limit=0.75)
    assert [slow.rank for slow in found] == [3]
    worst, little = [0.1, 4.0, 0.2, 5.0], [0.1, 1.2, 0.2, 2.0]
    found = find_slow([late, first, worst, first, first], stages=1, limit=0.75)
    assert found == [Slow(2, Section.compute, 0.25), Slow(0, Section.compute, 0.5)]
    assert find_slow([first, first, little], stages=1, limit=0.75) == []
    fast = [0.1, 0.5, 0.2, 2.0]
    assert find_slow([fast, first, first], stages=1, limit=0.75) == []  # one that is ahead slows nobody
    noisy = [0.1, 1.0, 0.29, 2.0]
    assert find_slow([first, first, noisy], stages=1, limit=0.75) == []
    assert find_slow([second], stages=1, limit=0.75) == []


@pytest.mark.parametrize("score", [0, 1, -0.5])
def test_the_limit_is_checked(score: float) -> None:
    with pytest.raises(ValueError, match=r"health.slow_score=.* must lie between 0 and 1"):
        HealthConfig(slow_score=score)
