"""train/pretrain.py whose saves pause for SECONDS_TO_WAIT inside a file while the file FLAG exists.

FLAG.reached appears when one pauses.
"""

import os
import runpy
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def main() -> None:
    """Run it with slow saves."""
    sys.path[0] = str(ROOT)
    storage: Any = import_module("train.checkpoint.storage")
    flag = Path(os.environ["FLAG"])

    def slow(name: str) -> None:
        if name == "mid_shard" and flag.exists():
            Path(f"{flag}.reached").touch()
            time.sleep(float(os.environ["SECONDS_TO_WAIT"]))

    storage.failpoint = slow
    runpy.run_path(str(ROOT / "train/pretrain.py"), run_name="__main__")


if __name__ == "__main__":
    main()
