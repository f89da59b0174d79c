"""train/pretrain.py with what the head reads multiplied by POISON_FACTOR in row POISON_ROW.

Of the micro-batches POISON_NUMBERS (by `MicroBatch.number`), on the ranks POISON_RANKS; both JSON lists.
"""

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def main() -> None:
    """Run it with the head poisoned."""
    sys.path[0] = str(ROOT)
    from model.transformer import Head, Transformer

    inner, head, number = Transformer.forward, Head.forward, [-1]
    numbers, ranks = json.loads(os.environ["POISON_NUMBERS"]), json.loads(os.environ["POISON_RANKS"])
    row, factor = int(os.environ["POISON_ROW"]), float(os.environ["POISON_FACTOR"])

    def forward(self: Transformer, *arguments: Any, **named: Any) -> Any:
        number[0] = -1 if named.get("number") is None else int(named["number"].view(-1)[0])
        return inner(self, *arguments, **named)

    def poisoned(self: Head, x: Any, targets: Any) -> Any:
        if number[0] in numbers and int(os.environ.get("RANK", "0")) in ranks:
            x = x.clone()
            x[row] *= factor
        return head(self, x, targets)

    Transformer.forward, Head.forward = forward, poisoned  # type: ignore[method-assign]
    runpy.run_path(str(ROOT / "train/pretrain.py"), run_name="__main__")


if __name__ == "__main__":
    main()
