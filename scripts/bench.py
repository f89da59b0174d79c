"""Measure a part of the program beside a lower bound and beside other implementations; print tables."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # import from the repository root, not from scripts/

import argparse
import json
from dataclasses import asdict, fields
from typing import Any

import torch

from scripts.benchmarks.moe import PoolSettings
from scripts.benchmarks.moe_time import LayerSettings
from scripts.benchmarks.tables import print_counts, print_kernels, print_times


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers with commas between them") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    kernels = parts.add_parser("kernels", help="kernels beside their lower bounds and other packages'")
    kernels.add_argument(
        "--only", type=lambda text: text.split(","), metavar="GROUP,...", help="of cases (default: all)"
    )
    kernels.add_argument("--peers", action="store_true", help="also time fla-core, liger-kernel and torch")
    moe = parts.add_parser(
        "moe",
        help="drops, balance and traffic of router.scope=local and global on skewed loads",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    moe.add_argument("--skews", type=_numbers, default="0,0.3,0.6,1,1.5", help="exponents of Zipf's law")
    moe.add_argument("--capacity-factor", type=float, default=1.0, help="buffer relative to an equal share")
    moe.add_argument("--edp", type=int, default=4, help="EP groups: replicas of each expert")
    moe.add_argument("--ep", type=int, default=8, help="ranks of an EP group")
    moe.add_argument("--experts", type=int, default=32, help="experts of the layer")
    moe.add_argument("--top-k", type=int, default=2, help="experts that a token chooses")
    moe.add_argument("--tokens", type=int, default=8192, help="tokens of an EP group in a micro-batch")
    moe.add_argument("--draws", type=int, default=16, help="random micro-batches for each line of the table")
    moe.add_argument("--hidden", type=int, default=6144, help="hidden size of a row that moves between ranks")
    moe.add_argument("--time", action="store_true", help="time one rank's layer on a GPU instead")
    moe.add_argument("--layer-tokens", type=int, default=16384, help="tokens of the timed layer")
    moe.add_argument("--layer-hidden", type=int, default=2048, help="its hidden size")
    moe.add_argument("--layer-ffn", type=int, default=1408, help="inner size of its experts")
    moe.add_argument("--repeats", type=int, default=20, help="timed runs, whose median is shown")
    for part in (kernels, moe):
        part.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers and the settings")
    return parser


def _moe(args: argparse.Namespace) -> dict[str, Any]:
    own = vars(args)
    pool = PoolSettings(**{field.name: own[field.name] for field in fields(PoolSettings)})
    if not args.time:
        return {"settings": asdict(pool), **print_counts(pool)}
    names = {field.name: f"layer_{field.name}" for field in fields(LayerSettings)}
    layer = LayerSettings(**{name: own[long if long in own else name] for name, long in names.items()})
    if not torch.cuda.is_available():
        raise ValueError("--time needs a CUDA device and finds none: times of a CPU would prove nothing")
    return {"settings": {**asdict(layer), "skews": args.skews}, **print_times(layer, args.skews)}


def main(argv: list[str] | None = None) -> int:
    """Run one part; exit code 2 if its arguments do not fit, 1 if some of its lines failed."""
    args = _parser().parse_args(argv)

    def save(numbers: dict[str, Any]) -> None:
        if args.json:
            args.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")

    try:
        if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
            raise ValueError(f"--json={args.json} must name a file in a folder that exists")
        if args.part == "kernels":
            return int(print_kernels(args.only, with_peers=args.peers, save=save))
        save(_moe(args))
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
