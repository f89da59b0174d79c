"""Write RUN_DIR/report.html: loss, speed, memory, stages, checkpoints, experts and alerts of a run."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # import from the repository root, not from scripts/

import argparse

from scripts.reporting.page import column, render
from scripts.reporting.run_files import read_run


def main(argv: list[str] | None = None) -> int:
    """Write the report; exit code 2 if the run directory cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="holds metrics.jsonl; receives report.html"
    )
    run_dir = parser.parse_args(argv).run_dir
    try:
        run = read_run(run_dir)
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    target = run_dir / "report.html"
    target.write_text(render(run), encoding="utf-8")
    first, last, held_out = run.metrics[0], run.metrics[-1], column(run.metrics, "eval_loss")
    summary = f"loss {first['loss']:.4f} at step {first['step']}, {last['loss']:.4f} at step {last['step']}"
    if len(held_out.y):
        summary += f"; held-out loss {held_out.y[-1]:.4f}"
    print(f"{summary}\nwrote {target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
