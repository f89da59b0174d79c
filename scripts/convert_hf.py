"""Hugging Face <-> checkpoint, one tensor after the other: `import --hf DIR --output CKPT`, or
`export --checkpoint CKPT --output DIR [--layout transformers|text01] [--dtype fp32|bf16|fp16]`.

An import holds weights alone, in the dtypes of its source. Details: docs/conversion.md.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # import from the repository root, not from scripts/

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby

import torch

from model.config import ModelConfig
from scripts.hf.config import ConversionError, Layout, read_config, write_config
from scripts.hf.names import BUFFERS, Piece, pieces
from scripts.hf.tensors import CHUNK, DTYPES, INDEX, Stored, find_tensors, read_json
from scripts.hf.tokenizer import copy_tokenizer, export_tokenizer
from train.checkpoint.load_model import model_config, open_checkpoint
from train.checkpoint.manifest import Manifest
from train.checkpoint.restore import read_boxes, verify
from train.checkpoint.storage import (
    MANIFEST,
    Box,
    CheckpointError,
    commit,
    file_name,
    free_bytes,
    manifest_part,
    no_room,
)
from train.checkpoint.tensor_file import CODES, TensorFileWriter, by_alignment

NAMED_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0; 2 for what cannot be converted."""
    args = parse_args(argv)
    try:
        if args.shard_bytes < 1:
            raise ConversionError(f"--shard-bytes {args.shard_bytes} must be at least 1")
        if args.action == "import":
            import_model(args.hf, args.output, shard_bytes=args.shard_bytes)
        else:
            dtype = None if args.dtype is None else NAMED_DTYPES[args.dtype]
            export_model(
                args.checkpoint,
                args.output,
                layout=Layout(args.layout),
                dtype=dtype,
                tokenizer=args.tokenizer,
                shard_bytes=args.shard_bytes,
            )
    except (ConversionError, CheckpointError, OSError) as error:
        print(f"convert_hf: error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    reading = actions.add_parser("import", help="Hugging Face -> checkpoint")
    reading.add_argument("--hf", required=True, type=Path, metavar="DIR", help="config.json and safetensors")
    writing = actions.add_parser("export", help="checkpoint -> Hugging Face")
    writing.add_argument("--checkpoint", required=True, type=Path, help="a step folder or a run directory")
    layouts = "transformers: AutoModelForCausalLM; text01: MiniMax's own code (default: %(default)s)"
    writing.add_argument("--layout", choices=list(Layout), default=Layout.transformers, help=layouts)
    dtypes = "of all tensors, but text01 keeps the routers' gates in fp32 (default: as imported, or as saved)"
    writing.add_argument("--dtype", choices=NAMED_DTYPES, help=dtypes)
    where = "tokenizer.json or its folder (default: the checkpoint's, or its data's)"
    writing.add_argument("--tokenizer", type=Path, metavar="DIR_OR_FILE", help=where)
    for action in (reading, writing):
        action.add_argument("--output", required=True, type=Path, help="folder to make")
        most = "bytes of a file, unless a tensor has more (default: %(default)s)"
        action.add_argument("--shard-bytes", type=int, default=5 * 10**9, metavar="N", help=most)
    return parser.parse_args(argv)


def import_model(hf: Path, output: Path, *, shard_bytes: int) -> None:
    """Write a checkpoint of a Hugging Face folder's weights, step 0.

    Raises:
        ConversionError: config, tensors or output are not what they must be; nothing is written then.
    """
    found = read_config(read_json(hf / "config.json"), str(hf / "config.json"))
    warn(found.warnings)
    stored = find_tensors(hf)
    check_tensors(hf, stored, found.model)
    parameters: dict[str, list[Piece]] = {}
    for parameter, parts in groupby(pieces(found.model), lambda piece: piece.parameter):
        parameters[f"model.{parameter}"] = list(parts)
    dtypes = {name: stored[parts[0].name].dtype for name, parts in parameters.items()}
    sizes = {name: sum(stored[part.name].size for part in parts) for name, parts in parameters.items()}
    with new_folder(output, sum(sizes.values())) as folder:
        progress, files = Progress(sum(sizes.values())), []
        for number, names in enumerate(shards(sizes, shard_bytes)):
            tensors = {name: outline(global_shape(parameters[name]), dtypes[name]) for name in names}
            path = folder / file_name(number)
            with TensorFileWriter(path, tensors) as writer:
                for name in by_alignment(tensors):
                    for part in parameters[name]:
                        for chunk in stored[part.name].chunks():
                            writer.write(chunk)
            boxes = {name: Box.whole(tensor) for name, tensor in tensors.items()}
            files.append(manifest_part(path.name, writer.facts, boxes))
            progress.wrote(path.name, len(names), writer.size)
        facts = {
            "step": 0,
            "kind": "weights",
            "config": {"model": asdict(found.model)},
            "source_dtypes": {name: CODES[dtype] for name, dtype in dtypes.items()},
            "hf_config": found.carried,
            "tokenizer": copy_tokenizer(hf, folder / "tokenizer"),
        }
        commit(folder, output, files, facts)


def check_tensors(hf: Path, stored: Mapping[str, Stored], cfg: ModelConfig) -> None:
    """The files hold the model's tensors, all of them, and no other.

    Raises:
        ConversionError: one is missing, unknown, or of another shape or dtype than its neighbours.
    """
    expected = {piece.name: piece for piece in pieces(cfg)}
    for name, piece in expected.items():
        if name not in stored:
            raise ConversionError(f"{hf}: has no tensor {name}, which config.json asks for; copy all files")
        if stored[name].shape != piece.shape:
            raise ConversionError(
                f"{stored[name].path}: {name} has shape {list(stored[name].shape)}, by config.json it is "
                f"{list(piece.shape)}"
            )
    extra = [name for name in stored if name not in expected and not BUFFERS.fullmatch(name)]
    if extra:
        raise ConversionError(
            f"{stored[extra[0]].path}: {extra[0]} (one of {len(extra)}) is no tensor of the model that "
            "config.json describes; it would be lost"
        )
    for parameter, parts in groupby(expected.values(), lambda piece: piece.parameter):
        if len(dtypes := {stored[part.name].dtype for part in parts}) > 1:
            raise ConversionError(f"{hf}: the matrices of {parameter} have several dtypes: {dtypes}")


def export_model(
    checkpoint: Path,
    output: Path,
    *,
    layout: Layout,
    dtype: torch.dtype | None,
    tokenizer: Path | None,
    shard_bytes: int,
) -> None:
    """Write a checkpoint's weights, whatever layout it was trained on, as a Hugging Face folder.

    Raises:
        ConversionError: the layout cannot express the model, or output is there already.
        CheckpointError: the checkpoint is not as it was written.
    """
    source = open_checkpoint(checkpoint)
    manifest, cfg = source.manifest, model_config(source)
    if problems := verify(source.folder):
        raise CheckpointError(problems[0])
    check_biases(manifest)
    plan = {piece.name: piece for piece in pieces(cfg)}
    dtypes = piece_dtypes(manifest, plan.values(), layout=layout, dtype=dtype)
    sizes = {name: math.prod(piece.shape) * dtypes[name].itemsize for name, piece in plan.items()}
    usual = dtypes["model.embed_tokens.weight"]
    with new_folder(output, sum(sizes.values())) as folder:
        carried, warnings = export_tokenizer(manifest, folder, tokenizer)
        text, more = write_config(cfg, layout, dtype=str(usual).removeprefix("torch."), carried=carried)
        (folder / "config.json").write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
        progress, weight_map = Progress(sum(sizes.values())), dict[str, str]()
        groups = list(shards(sizes, shard_bytes))
        for number, names in enumerate(groups, start=1):
            path = folder / f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            tensors = {name: outline(plan[name].shape, dtypes[name]) for name in names}
            with TensorFileWriter(path, tensors, {"format": "pt"}) as writer:
                for name in by_alignment(tensors):
                    for rows in read_piece(manifest, plan[name], dtypes[name]):
                        writer.write(rows)
            weight_map |= dict.fromkeys(names, path.name)
            progress.wrote(path.name, len(names), writer.size)
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card(output.name, layout, manifest.step, more), encoding="utf-8")
        folder.rename(output)
    warn([*warnings, *more])


def card(name: str, layout: Layout, step: int, warnings: Sequence[str]) -> str:
    """README.md of an export: what it is, and what its readers will do otherwise."""
    reader = "AutoModelForCausalLM" if layout is Layout.transformers else "MiniMax's own code"
    text = f"# {name}\nStep {step} of a Longspan run, exported for {reader} (`--layout {layout}`).\n"
    return text + "".join(f"\n**WARNING: {warning}**\n" for warning in warnings)


def check_biases(manifest: Manifest) -> None:
    """Refuse a model whose experts are chosen by more than the gate."""
    for name, saved in manifest.tensors.items():
        if name.startswith("router.bias."):
            bias = torch.zeros(saved.shape)
            read_boxes(manifest, {name: Box.whole(bias)})
            if bias.any():
                raise ConversionError(
                    f"{manifest.folder}: {name} is not zero: router.balancing=bias chooses experts by a bias "
                    "that no Hugging Face layout has; only router.balancing=aux_loss can be exported"
                )


def piece_dtypes(
    manifest: Manifest, plan: Iterable[Piece], *, layout: Layout, dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """What each tensor is written as: `dtype`, or what it was imported as, or what it is saved as."""
    recorded = manifest.part("source_dtypes") if "source_dtypes" in manifest.facts else {}
    found: dict[str, torch.dtype] = {}
    for parameter, parts in groupby(plan, lambda piece: piece.parameter):
        name = f"model.{parameter}"
        own = _dtype(manifest, name, recorded.get(name))
        for piece in parts:
            wide = piece.is_gate and layout is Layout.text01
            found[piece.name] = own if dtype is None else torch.float32 if wide else dtype
    return found


def _dtype(manifest: Manifest, name: str, recorded: str | None) -> torch.dtype:
    """Of a parameter: as it was imported, else as it is saved."""
    if name not in manifest.tensors:
        raise CheckpointError(f"{manifest.folder}: has no tensor {name}")
    saved = recorded or manifest.tensors[name].dtype
    if saved not in DTYPES:
        raise CheckpointError(f"{manifest.folder}: {name} has dtype {saved}, not one of {list(DTYPES)}")
    return DTYPES[saved]


def read_piece(manifest: Manifest, piece: Piece, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """A tensor as `dtype`, some rows at a time."""
    name, lead, ends = f"model.{piece.parameter}", (1,) * len(piece.place), (0,) * (len(piece.shape) - 1)
    shape = manifest.tensors[name].shape
    at_once = max(1, CHUNK // (4 * math.prod(piece.shape[1:])))
    for first in range(0, piece.shape[0], at_once):
        rows = torch.empty(*lead, min(at_once, piece.shape[0] - first), *piece.shape[1:], dtype=dtype)
        read_boxes(manifest, {name: Box(rows, shape, (*piece.place, first, *ends))})
        yield rows


def outline(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Make a tensor without values, to plan a file with."""
    return torch.empty(shape, dtype=dtype, device="meta")


def global_shape(parts: Sequence[Piece]) -> tuple[int, ...]:
    """Shape of the parameter that these are all the pieces of."""
    return (*(i + 1 for i in parts[-1].place), *parts[-1].shape)


def shards(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Names in order, in groups of at most `limit` bytes or a single one."""
    group: list[str] = []
    held = 0
    for name, size in sizes.items():
        if group and held + size > limit:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group


@contextmanager
def new_folder(output: Path, size: int) -> Iterator[Path]:
    """A folder beside `output` that becomes it at the end, or is removed; `size` bytes will be written.

    Raises:
        ConversionError: output exists, lies inside a checkpoint, or has no room.
    """
    if output.exists() or output.is_symlink():
        raise ConversionError(f"--output {output}: exists; give another folder or remove it")
    for parent in output.absolute().parents:
        if (parent / MANIFEST).exists():
            raise ConversionError(f"--output {output}: lies inside the checkpoint {parent}; give one outside")
    folder = output.with_name(f".tmp-{output.name}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        if (free := free_bytes(folder)) < size:
            raise ConversionError(f"--output {output}: {no_room(size, free)}")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Progress:
    """A line a file on stderr."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.started = total, 0, time.monotonic()

    def wrote(self, name: str, tensors: int, size: int) -> None:
        """Say that a file is complete."""
        self.done += size
        share = min(1.0, self.done / self.total)
        speed = self.done / 1e6 / max(1e-3, time.monotonic() - self.started)
        print(f"{name}: {tensors} tensors, {size:,} bytes; {share:.0%}, {speed:.0f} MB/s", file=sys.stderr)


def warn(texts: Sequence[str]) -> None:
    for text in texts:
        print(f"convert_hf: WARNING: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
