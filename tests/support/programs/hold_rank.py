"""train/pretrain.py whose ranks wait at a place, once, until they are asked to stop.

HOLD_AT is `step`, `data` or `save`, at the fourth call; where a rank waits, it has written RUN_DIR/held-N.
"""

import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def main() -> None:
    """Run it with the place held."""
    sys.path[0] = str(ROOT)
    from data.prefetch import Prefetcher
    from parallel.pipeline import SingleStage
    from train.guard.signals import StopRequest

    owner, name = {
        "step": (SingleStage, "forward_backward"),
        "data": (Prefetcher, "next_step"),
        "save": (import_module("train.loop"), "save"),
    }[os.environ["HOLD_AT"]]
    inner: Callable[..., Any] = getattr(owner, name)
    run_dir = Path(next(arg.partition("=")[2] for arg in sys.argv if arg.startswith("run_dir=")))
    calls: list[int] = []

    def held(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            handler = signal.getsignal(signal.SIGTERM)
            stop: StopRequest = handler.__self__  # type: ignore[union-attr]
            (run_dir / f"held-{os.environ['RANK']}").touch()
            while stop.signal_name is None:
                time.sleep(0.01)
        return inner(*arguments)

    setattr(owner, name, held)
    runpy.run_path(str(ROOT / "train/pretrain.py"), run_name="__main__")


if __name__ == "__main__":
    main()
