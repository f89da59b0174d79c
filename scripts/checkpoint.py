"""Look at a checkpoint: `scripts/checkpoint.py inspect|verify CKPT`, a step folder or a run directory."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # import from the repository root, not from scripts/

import argparse
import math
from collections import Counter

from train.checkpoint.manifest import read_manifest, show
from train.checkpoint.restore import verify
from train.checkpoint.storage import MANIFEST, CheckpointError, find_checkpoints
from train.checkpoint.tensor_file import DTYPES


def main() -> int:
    """Run the command; exit code 0, 2 if there is no checkpoint, 3 if it is damaged."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["inspect", "verify"])
    parser.add_argument("checkpoint", type=Path)
    arguments = parser.parse_args()
    found = find_checkpoints(arguments.checkpoint / "checkpoints", complete=True)
    folder = next(iter(found), arguments.checkpoint)
    if not (folder / MANIFEST).exists():
        print(f"error: {folder}: no checkpoint, it has no {MANIFEST}", file=sys.stderr)
        return 2
    if arguments.action == "inspect":
        return inspect(folder)
    problems = verify(folder)  # hashes every byte
    print("\n".join(problems) or f"{folder}: all bytes are as written")
    return 3 if problems else 0


def inspect(folder: Path) -> int:
    """Print the manifest's facts."""
    try:
        manifest = read_manifest(folder, is_checked=False)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    print(f"{'step':<12}{manifest.step}")
    for key in ("format", "kind", "git_commit", "torch", "progress"):
        if key in manifest.facts:
            print(f"{key:<12}{show(manifest.facts[key])}")
    counts: Counter[str] = Counter()
    for name, tensor in manifest.tensors.items():
        kind = f"{name.partition('.')[0]} {tensor.dtype or ''}".strip()
        counts[kind] += math.prod(tensor.shape) * DTYPES[tensor.dtype or "F32"].itemsize
    print(f"{'tensors':<12}{len(manifest.tensors)}")
    for kind, size in counts.items():
        print(f"  {kind:<16}{size:>18,} bytes")
    for name, facts in manifest.files.items():
        print(f"{name}  {facts.size:>14,} bytes  {facts.sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
