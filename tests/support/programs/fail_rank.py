"""train/pretrain.py whose rank 1 fails in step 3: FAILURE is `segv`, `raise` or `exit`."""

import os
import runpy
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def fail() -> None:
    """Do what FAILURE says."""
    match os.environ["FAILURE"]:
        case "segv":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "raise":
            raise RuntimeError("broken on purpose")
        case "exit":
            os._exit(0)


def main() -> None:
    """Run it with the fault in place."""
    sys.path[0] = str(ROOT)
    loop: Any = import_module("train.loop")
    inner = loop.train_step

    def step(run: Any, batches: Sequence[Any]) -> Any:
        if run.progress.step == 2 and run.mesh.rank == 1:
            fail()
        return inner(run, batches)

    loop.train_step = step
    runpy.run_path(str(ROOT / "train/pretrain.py"), run_name="__main__")


if __name__ == "__main__":
    main()
