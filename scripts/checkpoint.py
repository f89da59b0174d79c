"""Look at a checkpoint: `scripts/checkpoint.py inspect|verify CKPT`, a step folder or a run directory."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # import from the repository root, not from scripts/

import argparse

from train.restore import read_manifest, verify
from train.storage import CheckpointError, checkpoints_in


def main() -> int:
    """Exit code: 0; 2 if it is no checkpoint; 3 if a file is not what the manifest says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["inspect", "verify"])
    parser.add_argument("checkpoint", type=Path)
    arguments = parser.parse_args()
    newest = next(checkpoints_in(arguments.checkpoint / "checkpoints"), None)
    folder = arguments.checkpoint if newest is None else newest[1]
    try:
        return inspect(folder) if arguments.action == "inspect" else report(folder)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def inspect(folder: Path) -> int:
    """Print the manifest's facts."""
    manifest = read_manifest(folder)
    for key in ("step", "format", "git_commit", "torch"):
        print(f"{key:<12}{manifest.get(key)}")
    print(f"{'tensors':<12}{len(manifest['tensors'])}")
    for name, facts in manifest.get("files", {}).items():
        print(f"{name}  {facts['size']:>14,} bytes  {facts['sha256']}")
    return 0


def report(folder: Path) -> int:
    """Hash every byte, print one line a bad file."""
    problems = verify(folder)
    for problem in problems:
        print(problem)
    if not problems:
        print(f"{folder}: all bytes are as written")
    return 3 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
