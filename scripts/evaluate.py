"""Evaluate long contexts: needles in a haystack, or perplexity by length; writes JSON, SVG and HTML."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # import from the repository root, not from scripts/

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import torch

from data.dataset import TokenDataset
from data.stream import split_documents
from model.decoding import decoding
from model.sampling import Sampling, continue_prompts
from model.transformer import Transformer
from scripts.needles import KEYS, SENTENCES, encoder, make_task
from scripts.reporting.charts import SCRIPT, STYLE, Series, draw_heat_map, line_chart, lone_svg
from train.checkpoint.load_model import (
    DTYPES,
    choose_device,
    choose_dtype,
    find_tokenizer,
    load_model,
    open_checkpoint,
)
from train.checkpoint.manifest import Manifest
from train.checkpoint.storage import CheckpointError
from train.monitor.heat_maps import HeatMap

REACH = (0.25, 0.5, 1, 2, 4)
"""Default lengths, in rows of the training."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    niah = kinds.add_parser("niah", help="are facts found in a long text, by depth and length?")
    perplexity = kinds.add_parser("perplexity", help="does perplexity fall with the length of the context?")
    for one in (niah, perplexity):
        add = one.add_argument
        add("--checkpoint", type=Path, required=True, metavar="CKPT", help="a step folder or a run directory")
        add("--lengths", type=numbers, metavar="N,N,...", help="in tokens (default: 1/4 to 4 training rows)")
        add("--rows", type=int, default=8, metavar="N", help="texts in a batch (default: %(default)s)")
        add("--chunk", type=int, default=2048, metavar="N", help="tokens per pass (default: %(default)s)")
        add("--output", type=Path, metavar="FOLDER", help="of the results (default: the run's, else .)")
        add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto = a GPU if there is one")
        add("--dtype", choices=list(DTYPES), help="of the weights (default: bf16 on a GPU, else fp32)")
    add = niah.add_argument
    add("--depths", type=int, default=5, metavar="N", help="evenly spaced depths (default: %(default)s)")
    add("--samples", type=int, default=16, metavar="N", help="questions a cell (default: %(default)s)")
    add(
        "--distractors", type=int, default=3, metavar="N",
        help="facts about other keys (default: %(default)s)",
    )  # fmt: skip
    add("--haystack", type=Path, metavar="FILE", help="one sentence a line (default: ten built in)")
    add("--tokenizer", type=Path, metavar="FILE_OR_FOLDER", help="default: the checkpoint's, else its data's")
    add("--seed", type=int, default=0, help="of the questions (default: %(default)s)")
    add = perplexity.add_argument
    add("--data", metavar="PREFIX", help="token files (default: held out of the first source)")
    add(
        "--documents", type=int, default=16, metavar="N", help="first ones long enough (default: %(default)s)"
    )
    return parser.parse_args(argv)


def numbers(text: str) -> list[int]:
    """`64,128` -> [64, 128], ascending."""
    found = sorted({int(part) for part in text.split(",")})
    if found[0] < 2:
        raise ValueError(text)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0; 2 if checkpoint, data or options cannot be used."""
    args = parse_arguments(argv)
    try:
        for key in ("rows", "chunk", "depths", "samples", "documents"):
            if getattr(args, key, 1) < 1:
                raise ValueError(f"--{key} {getattr(args, key)} must be at least 1")
        for key, most in (("seed", 2**63), ("distractors", len(KEYS) - 1)):
            if not 0 <= getattr(args, key, 0) <= most:
                raise ValueError(f"--{key} {getattr(args, key)} must lie in [0, {most}]")
        device = choose_device(args.device)
        checkpoint = open_checkpoint(args.checkpoint)
        lengths = args.lengths or default_lengths(checkpoint)
        folder = args.output or output_folder(checkpoint)
        folder.mkdir(parents=True, exist_ok=True)
        model = load_model(checkpoint, device=device, dtype=choose_dtype(args.dtype, device))
        evaluation = niah if args.kind == "niah" else perplexity
        figure, results = evaluation(model, checkpoint, lengths, args)
        write(args.kind, figure, results, folder)
    except (CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def default_lengths(checkpoint: Manifest) -> list[int]:
    """Around the length that the model was trained at."""
    row = trained_length(checkpoint)
    if row is None:
        raise ValueError(f"{checkpoint.folder} does not say at which length it was trained; give --lengths")
    return [max(2, int(reach * row)) for reach in REACH]


def trained_length(checkpoint: Manifest) -> int | None:
    """Tokens of a training row; None for a model that was imported."""
    return (checkpoint.config.get("batch") or {}).get("row_tokens")


def output_folder(checkpoint: Manifest) -> Path:
    """The run directory around the checkpoint, else the working directory."""
    parent = checkpoint.folder.resolve().parent
    return parent.parent if parent.name == "checkpoints" else Path()


def niah(
    model: Transformer, checkpoint: Manifest, lengths: list[int], args: argparse.Namespace
) -> tuple[str, dict[str, Any]]:
    """Ask for a fact at each depth and length; right is an answer that has all its tokens."""
    encode = encoder(find_tokenizer(checkpoint, args.tokenizer))
    sentences = SENTENCES if args.haystack is None else read_sentences(args.haystack)
    depths = np.linspace(0, 1, args.depths) if args.depths > 1 else np.array([0.5])
    found = np.zeros((len(depths), len(lengths)))
    for (column, tokens), (row, depth) in itertools.product(enumerate(lengths), enumerate(depths)):
        draw = np.random.default_rng([args.seed, row, tokens])
        tasks = [
            make_task(encode, sentences, draw, tokens=tokens, depth=depth, distractors=args.distractors)
            for _ in range(args.samples)
        ]
        for first in range(0, len(tasks), args.rows):
            some = tasks[first : first + args.rows]
            longest = max(len(task.answer) for task in some)
            prompts = [task.prompt for task in some]
            answers = continue_prompts(
                model, prompts, end=None, max_tokens=longest, how=Sampling(), chunk=args.chunk
            )
            right = [a[: len(task.answer)] == task.answer for a, task in zip(answers, some, strict=True)]
            found[row, column] += sum(right) / len(tasks)
    percents = [f"{100 * depth:.0f} %" for depth in depths]
    labels = [f"{tokens:,}" for tokens in lengths]
    for name, line in zip(
        ("depth", *percents), (labels, *(100 * found).round().astype(int).astype(str)), strict=True
    ):
        print(f"{name:>8}" + "".join(f"{cell:>9}" for cell in line))
    trained = trained_length(checkpoint)
    title = f"Needles found, % (trained at {trained:,} tokens)" if trained else "Needles found, %"
    heat_map = HeatMap(100 * found, ("depth", percents), ("tokens", labels), 0, 100)

    def tip(r: int, c: int) -> str:
        return f"depth {percents[r]}, {labels[c]} tokens: {100 * found[r, c]:.1f} %"

    figure = draw_heat_map(title, heat_map, tip, hue="good", has_numbers=True)
    results = {"depths": depths.tolist(), "found": found.tolist(), "samples": args.samples}
    results |= {"distractors": args.distractors, "seed": args.seed, "mean": found.mean(0).tolist()}
    return figure, {**facts(checkpoint, lengths), **results}


def read_sentences(file: Path) -> list[str]:
    """The lines of a text, each with a blank in front."""
    try:
        lines = [" " + line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--haystack {file}: {error}; give a text file, one line a sentence") from error
    if not lines:
        raise ValueError(f"--haystack {file}: holds no text; give one line a sentence")
    return lines


def perplexity(
    model: Transformer, checkpoint: Manifest, lengths: list[int], args: argparse.Namespace
) -> tuple[str, dict[str, Any]]:
    """Of whole texts of each length, and of their last tokens: those behind the length before."""
    texts = read_texts(checkpoint, args.data, lengths[-1] + 1, args.documents)
    device = next(model.parameters()).device
    sums, memory = np.zeros(lengths[-1]), {}
    for some in torch.from_numpy(texts).split(args.rows):
        none = torch.zeros(len(some), args.chunk, dtype=torch.bool)
        with decoding(model, rows=len(some), capacity=lengths[-1]) as decoder:
            for first in range(0, lengths[-1], args.chunk):
                last = min(first + args.chunk, lengths[-1])
                hidden = decoder.read(some[:, first:last].to(device), none[:, : last - first])
                losses = decoder.losses(hidden, some[:, first + 1 : last + 1].to(device))
                sums[first:last] += losses.double().sum(0).cpu().numpy()
            memory = {"state_bytes": decoder.state_bytes(), "cache_bytes": decoder.cache_bytes()}
    mean = sums / len(texts)
    whole = [math.exp(mean[:length].mean()) for length in lengths]
    newest = [math.exp(mean[a:b].mean()) for a, b in zip([0, *lengths], lengths, strict=False)]
    print(f"{'tokens':>9}{'whole':>12}{'newest':>12}")
    for row in zip(lengths, whole, newest, strict=True):
        print("{:>9,}{:>12.3f}{:>12.3f}".format(*row))
    trained, x = trained_length(checkpoint), np.array(lengths, dtype=float)
    title = "Perplexity by length" + (f" (trained at {trained:,} tokens)" if trained else "")
    last_tokens = Series("its last tokens", x, np.array(newest), x, "points")
    curves = [Series("whole text", x, np.array(whole), x), last_tokens]
    results = {"documents": len(texts), "perplexity": whole, "newest": newest, **memory}
    sizes = f"{memory['state_bytes']:,} bytes, keys and values {memory['cache_bytes']:,} bytes"
    print(f"lightning states {sizes}")
    figure = line_chart(title, curves, x_title="tokens; line: whole text, dots: its last tokens")
    return figure, {**facts(checkpoint, lengths), **results}


def read_texts(checkpoint: Manifest, prefix: str | None, tokens: int, count: int) -> np.ndarray:
    """[documents, tokens] first tokens of documents that have so many.

    Raises:
        ValueError: there are none.
    """
    data = checkpoint.config.get("data") or {}
    fraction = 0.0
    if prefix is None:
        prefix, fraction = (data.get("sources") or [{}])[0].get("path"), data.get("eval_fraction", 0.0)
        if prefix is None or not fraction:
            raise ValueError(
                f"{checkpoint.folder} held no documents of a PREFIX out of training; give --data PREFIX"
            )
    dataset = TokenDataset(prefix)
    split = "eval" if fraction else "train"
    documents = split_documents(dataset.document_lengths, split=split, eval_fraction=fraction)
    lengths = dataset.document_lengths[documents]
    chosen = documents[lengths >= tokens][:count]
    if not len(chosen):
        raise ValueError(
            f"{prefix}: the longest of {len(documents)} documents{' held out' if fraction else ''} has "
            f"{lengths.max(initial=0)} tokens; --lengths {tokens - 1} needs one more; use shorter or --data"
        )
    texts = np.empty((len(chosen), tokens), np.int64)
    for row, document in enumerate(chosen):
        dataset.read(int(document), 0, texts[row])
    if (largest := int(texts.max())) >= (limit := checkpoint.config["model"]["vocab_size"]):
        raise ValueError(
            f"{prefix}: holds token {largest}, the model knows {limit}; prepare it with its tokenizer"
        )
    return texts


def facts(checkpoint: Manifest, lengths: list[int]) -> dict[str, Any]:
    """What all results say."""
    known = {"checkpoint": str(checkpoint.folder), "step": checkpoint.step}
    return {**known, "trained_length": trained_length(checkpoint), "lengths": lengths}


def write(kind: str, figure: str, results: dict[str, Any], folder: Path) -> None:
    """KIND.json, KIND.svg and KIND.html, which need nothing else."""
    target = folder / kind
    target.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    target.with_suffix(".svg").write_text(lone_svg(figure), encoding="utf-8")
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{kind}</title><style>{STYLE}</style></head>
<body><h1>{escape(results["checkpoint"])}</h1>{figure}
<details><summary>Results</summary><pre>{escape(json.dumps(results, indent=1))}</pre></details>
<div id="tip"></div><script>{SCRIPT}</script></body></html>
"""
    target.with_suffix(".html").write_text(page, encoding="utf-8")
    print(f"wrote {target}.json, .svg, .html")


if __name__ == "__main__":
    sys.exit(main())
