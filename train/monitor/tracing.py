"""A profiler trace of a few steps on request, one file a rank, for chrome://tracing or ui.perfetto.dev."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function, supported_activities


@dataclass(kw_only=True)
class ProfileConfig:
    """Which steps to trace."""

    steps: list[int] = field(default_factory=list)
    """[a, b]: steps a to b-1, into RUN_DIR/profile/; empty = none. Tracing slows these steps."""

    def __post_init__(self) -> None:
        """Check the range."""
        if self.steps and not (len(self.steps) == 2 and 1 <= self.steps[0] < self.steps[1]):
            raise ValueError(
                f"profile.steps={list(self.steps)} must be [a, b] with 1 <= a < b: steps a to b-1"
            )


class Tracer:
    """Traces what this rank does from the first asked step to the last, or to the end of the run."""

    def __init__(self, cfg: ProfileConfig, run_dir: Path, *, rank: int, total_steps: int) -> None:
        self.first, end = cfg.steps or (0, 0)
        self.last = min(end - 1, total_steps)
        name = f"rank-{rank:05d}-steps-{self.first}-{self.last}.json"
        self.path = run_dir / "profile" / name
        self.profile: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around one step; writes the file after the last."""
        if self.first and self.first <= number <= self.last and self.profile is None:
            kinds = {ProfilerActivity.CPU, ProfilerActivity.CUDA} & supported_activities()
            self.profile = profile(activities=kinds)
            self.profile.start()
        if self.profile is None:
            yield
            return
        with record_function(f"step {number}"):
            yield
        if number == self.last:
            self.profile.stop()
            self.path.parent.mkdir(exist_ok=True)
            self.profile.export_chrome_trace(str(self.path))
            self.profile, self.first = None, 0
