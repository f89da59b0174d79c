"""The tables that scripts/bench.py prints, and their numbers for its JSON file."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

from scripts.benchmarks.cases import all_cases
from scripts.benchmarks.kernels import COLUMNS as KERNEL_COLUMNS
from scripts.benchmarks.kernels import (
    Line,
    check_peers,
    choose_cases,
    format_cells,
    measure_case,
    measure_ceilings,
    median_ms,
)
from scripts.benchmarks.moe import COLUMNS, PoolSettings, SkewFigures, count_drops
from scripts.benchmarks.moe_time import TIME_COLUMNS, LayerSettings, cuda_ms, time_layer

READING = """\
dropped     choices above the capacity: mean (lowest to highest) of the draws; global drops the lower bound
level       rows of the fullest EP rank, for which the layer waits, / those of a mean rank; mean of the draws
moved       global: choices computed in another EP group than their token's, % of all; local: none
MiB a rank  their hidden states and weights, a layer and direction, mean of the ranks
dispatch    {dispatch:.1f} MiB a rank and direction for all choices, in its EP group or out of it
counts      {gather:.1f} KiB that a rank receives before dispatch, a layer"""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out right-aligned columns; a column's name may have several lines."""
    names = [name.split("\n") for name in columns]
    height = max(map(len, names))
    names = [[""] * (height - len(name)) + name for name in names]
    lines = [*zip(*names, strict=True), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*text[:height], "  ".join("-" * width for width in widths), *text[height:]])


def _percent(row: SkewFigures, key: str) -> str:
    mean, low, high = (100 * value for value in row.figures[key])
    return f"{mean:.2f} ({low:5.2f} to {high:5.2f})"


def _count_line(row: SkewFigures) -> list[str]:
    level, moved = (row.figures[key][0] for key in ("dropless_level", "moved"))
    return [
        f"{row.skew:g}",
        _percent(row, "local_dropped"),
        _percent(row, "global_dropped"),
        f"{level:.2f}",
        *(f"{row.figures[key][0]:.2f}" for key in ("local_level", "global_level")),
        f"{100 * moved:.2f}",
        f"{row.figures['moved_bytes'][0] / 2**20:.2f}",
    ]


def print_counts(settings: PoolSettings) -> dict[str, Any]:
    """Simulate the draws, print both tables and return their numbers."""
    s, kinds = settings, count_drops(settings)
    print(
        f"edp {s.edp}  ep {s.ep}  experts {s.experts}  top-k {s.top_k}  capacity factor "
        f"{s.capacity_factor:g}  tokens an EP group {s.tokens}  hidden {s.hidden}  draws {s.draws}\n"
        f"An expert admits {s.limit} choices an EP group (local) or {s.pool_limit} of all groups (global)."
    )
    if s.is_rounded:
        print(
            f"Rounding up in each group gives the local scope {s.edp * s.limit} in all, more than that: "
            "compare at sizes where they are equal."
        )
    for name, rows in kinds.items():
        print(f"\n{name}\n{table(COLUMNS, [_count_line(row) for row in rows])}")
    dispatch = s.row_bytes * s.choices / s.ranks / 2**20
    print("\n" + READING.format(dispatch=dispatch, gather=s.gather_bytes / 2**10))
    return {
        "capacity": {"local": s.limit, "global": s.pool_limit, "is_rounded": s.is_rounded},
        "gather_bytes": s.gather_bytes,
        "kinds": {name: [row._asdict() for row in rows] for name, rows in kinds.items()},
    }


def print_times(settings: LayerSettings, skews: Sequence[float]) -> dict[str, Any]:
    """Time one rank's layer at each capacity and skew and print the table and return its numbers."""
    device = torch.device("cuda")
    name, s = torch.cuda.get_device_name(device), settings
    print(
        f"{name}, torch {torch.__version__}: one rank's MoE layer, forward and backward, bf16\n"
        f"experts {s.experts}  top-k {s.top_k}  tokens {s.tokens}  hidden {s.hidden}  ffn {s.ffn}  "
        f"median of {s.repeats}"
    )
    times = [time_layer(s, f, skew, device, cuda_ms) for f in (None, 1.0, 1.25) for skew in skews]
    print(table(TIME_COLUMNS, [time.line() for time in times]))
    return {"device": name, "torch": torch.__version__, "times": [time._asdict() for time in times]}


def print_kernels(
    only: Sequence[str] | None, *, with_peers: bool, save: Callable[[dict[str, Any]], None]
) -> bool:
    """Time each case, print and save its lines at once; return whether something failed."""
    if not torch.cuda.is_available():
        raise ValueError("kernels needs a CUDA device and finds none: times of a CPU would prove nothing")
    device = torch.device("cuda")
    cases = choose_cases(all_cases(device), only)
    if with_peers:
        check_peers()
    name, ceilings = torch.cuda.get_device_name(device), measure_ceilings(device)
    print(
        f"{name}, torch {torch.__version__}, triton {triton.__version__}\n"
        f"floors: 8192^3 bf16 product {ceilings.tflops:.0f} TFLOP/s, copy {ceilings.tb_per_s:.2f} TB/s\n"
        f"{format_cells(list(KERNEL_COLUMNS))}"
    )
    versions = {"device": name, "torch": torch.__version__, "triton": triton.__version__}
    lines: list[Line] = []
    for case in cases:
        for line in measure_case(case, ceilings, median_ms, with_peers=with_peers):
            print("\n    ".join([format_cells(line.cells()), *line.errors]), flush=True)
            lines.append(line)
        save({**versions, "ceilings": ceilings._asdict(), "lines": [line._asdict() for line in lines]})
        torch.cuda.empty_cache()
    return any(line.errors for line in lines)
