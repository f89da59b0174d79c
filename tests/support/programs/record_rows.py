"""train/pretrain.py that also writes what each step reads: a digest of each of this rank's rows, in order."""

import hashlib
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def main() -> None:
    """Run it, with a line {step, rows: [micro-batches][rows]} in RUN_DIR/rows-RANK.jsonl for each step."""
    sys.path[0] = str(ROOT)
    from data.prefetch import Prefetcher

    inner = Prefetcher.next_step
    run_dir = next(arg.partition("=")[2] for arg in sys.argv if arg.startswith("run_dir="))

    def next_step(self: Prefetcher) -> list[Any]:
        batches = inner(self)
        rows = [[digest(*row) for row in zip(batch.tokens, batch.targets, strict=True)] for batch in batches]
        with Path(run_dir, f"rows-{os.environ.get('RANK', '0')}.jsonl").open("a") as file:
            file.write(json.dumps({"step": self._step, "rows": rows}) + "\n")
        return batches

    Prefetcher.next_step = next_step  # type: ignore[method-assign]
    runpy.run_path(str(ROOT / "train/pretrain.py"), run_name="__main__")


def digest(*tensors: Any) -> str:
    return hashlib.blake2b(b"".join(t.numpy().tobytes() for t in tensors), digest_size=8).hexdigest()


if __name__ == "__main__":
    main()
