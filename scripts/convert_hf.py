"""Converts Hugging Face folders to checkpoints and back, one tensor after the other.

`import --hf DIR --output CKPT`, or
`export --checkpoint CKPT --output DIR [--layout transformers|text01] [--dtype fp32|bf16|fp16]`.
An import holds weights alone, in the dtypes of its source. Details: docs/guides/conversion.md.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # import from the repository root, not from scripts/

import argparse
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import groupby

import torch
from rich.console import Console
from rich.progress import track

from model.config import ModelConfig
from scripts.hf.config import ConversionError, Layout, read_config, write_config
from scripts.hf.names import BUFFERS, HfTensor, hf_tensors
from scripts.hf.tensors import CHUNK, INDEX, SourceTensor, find_tensors, read_json
from scripts.hf.tokenizer import copy_tokenizer, export_tokenizer
from train.checkpoint.load_model import model_config, open_checkpoint
from train.checkpoint.manifest import Manifest
from train.checkpoint.restore import read_boxes, verify
from train.checkpoint.storage import (
    MANIFEST,
    Box,
    CheckpointError,
    ManifestPart,
    commit,
    file_name,
    free_bytes,
    manifest_part,
    no_room,
)
from train.checkpoint.tensor_file import CODES, DTYPES, TensorFileWriter, by_alignment

NAMED_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 2 for what cannot be converted."""
    args = parse_args(argv)
    try:
        if args.shard_bytes < 1:
            raise ConversionError(f"--shard-bytes {args.shard_bytes} must be at least 1")
        if args.action == "import":
            import_model(args.hf, args.output, shard_bytes=args.shard_bytes)
        else:
            export_model(
                args.checkpoint, args.output, layout=Layout(args.layout),
                dtype=NAMED_DTYPES.get(args.dtype), tokenizer=args.tokenizer, shard_bytes=args.shard_bytes,
            )  # fmt: skip
    except (ConversionError, CheckpointError, OSError) as error:
        print(f"convert_hf: error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
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
    sources: dict[str, list[HfTensor]] = {}
    for parameter, theirs in groupby(hf_tensors(found.model), lambda tensor: tensor.parameter):
        sources[f"model.{parameter}"] = list(theirs)
    plan = {name: outline(whole_shape(parts), stored[parts[0].name].dtype) for name, parts in sources.items()}

    def read(name: str) -> Iterator[bytes]:
        for part in sources[name]:
            yield from stored[part.name].chunks()

    with new_folder(output, total_bytes(plan)) as folder:
        files = {file_name(n): tensors for n, tensors in enumerate(split(plan, shard_bytes))}
        parts = write_files(folder, files, read)
        facts = {
            "step": 0,
            "kind": "weights",
            "config": {"model": asdict(found.model)},
            "source_dtypes": {name: CODES[tensor.dtype] for name, tensor in plan.items()},
            "hf_config": found.carried,
            "tokenizer": copy_tokenizer(hf, folder / "tokenizer"),
        }
        commit(folder, output, parts, facts)


def check_tensors(hf: Path, stored: Mapping[str, SourceTensor], cfg: ModelConfig) -> None:
    """Refuse files that do not hold the model's tensors, all of them and no other.

    Raises:
        ConversionError: one is missing, unknown, or of another shape or dtype than its neighbours.
    """
    expected = {tensor.name: tensor for tensor in hf_tensors(cfg)}
    for name, tensor in expected.items():
        if name not in stored:
            raise ConversionError(f"{hf}: has no tensor {name}, which config.json asks for; copy all files")
        if stored[name].shape != tensor.shape:
            raise ConversionError(
                f"{stored[name].path}: {name} has shape {list(stored[name].shape)}, by config.json it is "
                f"{list(tensor.shape)}"
            )
    extra = [name for name in stored if name not in expected and not BUFFERS.fullmatch(name)]
    if extra:
        raise ConversionError(
            f"{stored[extra[0]].path}: {extra[0]} (one of {len(extra)}) is no tensor of the model that "
            "config.json describes; it would be lost"
        )
    for parameter, parts in groupby(expected.values(), lambda tensor: tensor.parameter):
        if len(dtypes := {stored[part.name].dtype for part in parts}) > 1:
            raise ConversionError(f"{hf}: the matrices of {parameter} have several dtypes: {dtypes}")


def export_model(
    checkpoint: Path, output: Path, *, layout: Layout, dtype: torch.dtype | None, tokenizer: Path | None,
    shard_bytes: int,
) -> None:  # fmt: skip
    """Write a checkpoint's weights, whatever layout it was trained on, as a Hugging Face folder.

    Raises:
        ConversionError: the layout cannot express the model, or output is there already.
        CheckpointError: the checkpoint is not as it was written.
    """
    manifest = open_checkpoint(checkpoint)
    cfg = model_config(manifest)
    if problems := verify(manifest.folder):
        raise CheckpointError(problems[0])
    check_biases(manifest)
    theirs = {tensor.name: tensor for tensor in hf_tensors(cfg)}
    dtypes = export_dtypes(manifest, theirs.values(), layout=layout, dtype=dtype)
    plan = {name: outline(tensor.shape, dtypes[name]) for name, tensor in theirs.items()}
    usual = dtypes["model.embed_tokens.weight"]
    groups = list(split(plan, shard_bytes))
    files = {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, 1)}
    with new_folder(output, total_bytes(plan)) as folder:
        carried, warnings = export_tokenizer(manifest, folder, tokenizer)
        text, more = write_config(cfg, layout, dtype=str(usual).removeprefix("torch."), carried=carried)
        (folder / "config.json").write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
        write_files(
            folder, files, lambda name: read_rows(manifest, theirs[name], dtypes[name]), {"format": "pt"}
        )
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        index = {"metadata": {"total_size": total_bytes(plan)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card(output.name, layout, manifest.step, more), encoding="utf-8")
        folder.rename(output)
    warn([*warnings, *more])


def card(name: str, layout: Layout, step: int, warnings: Sequence[str]) -> str:
    """Write the README.md of an export: what it is, and what its readers will do otherwise."""
    reader = "AutoModelForCausalLM" if layout is Layout.transformers else "MiniMax's own code"
    text = f"# {name}\nStep {step} of a Longspan run, exported for {reader} (`--layout {layout}`).\n"
    return text + "".join(f"\n**WARNING: {warning}**\n" for warning in warnings)


def check_biases(manifest: Manifest) -> None:
    """Refuse a model whose experts are chosen by more than the gate."""
    for name, tensor in manifest.tensors.items():
        if name.startswith("router.bias."):
            bias = torch.zeros(tensor.shape)
            read_boxes(manifest, {name: Box.whole(bias)})
            if bias.any():
                raise ConversionError(
                    f"{manifest.folder}: {name} is not zero: router.balancing=bias chooses experts by a bias "
                    "that no Hugging Face layout has; only router.balancing=aux_loss can be exported"
                )


def export_dtypes(
    manifest: Manifest, theirs: Iterable[HfTensor], *, layout: Layout, dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Choose each tensor's dtype: the one given, else that of the import, else that of the checkpoint."""
    recorded = manifest.part("source_dtypes") if "source_dtypes" in manifest.facts else {}
    found: dict[str, torch.dtype] = {}
    for tensor in theirs:
        name = f"model.{tensor.parameter}"
        if name not in manifest.tensors:
            raise CheckpointError(f"{manifest.folder}: has no tensor {name}")
        own = recorded.get(name) or manifest.tensors[name].dtype
        if own not in DTYPES:
            raise CheckpointError(f"{manifest.folder}: {name} has dtype {own}, not one of {list(DTYPES)}")
        wide = tensor.is_gate and layout is Layout.text01
        found[tensor.name] = DTYPES[own] if dtype is None else torch.float32 if wide else dtype
    return found


def read_rows(manifest: Manifest, wanted: HfTensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Read a tensor as `dtype`, some rows at a time."""
    name, lead, ends = f"model.{wanted.parameter}", (1,) * len(wanted.place), (0,) * (len(wanted.shape) - 1)
    shape = manifest.tensors[name].shape
    at_once = max(1, CHUNK // (4 * math.prod(wanted.shape[1:])))
    for first in range(0, wanted.shape[0], at_once):
        rows = torch.empty(*lead, min(at_once, wanted.shape[0] - first), *wanted.shape[1:], dtype=dtype)
        read_boxes(manifest, {name: Box(rows, shape, (*wanted.place, first, *ends))})
        yield rows


def outline(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Make a tensor without values, to plan a file with."""
    return torch.empty(shape, dtype=dtype, device="meta")


def whole_shape(parts: Sequence[HfTensor]) -> tuple[int, ...]:
    """Give the shape of the parameter that these tensors make up, the last one last."""
    return (*(i + 1 for i in parts[-1].place), *parts[-1].shape)


def total_bytes(plan: Mapping[str, torch.Tensor]) -> int:
    """Sum the bytes of all tensors."""
    return sum(tensor.nbytes for tensor in plan.values())


def split(plan: Mapping[str, torch.Tensor], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    """Cut a plan, in its order, into groups of at most `limit` bytes or of a single tensor."""
    group, held = dict[str, torch.Tensor](), 0
    for name, tensor in plan.items():
        if group and held + tensor.nbytes > limit:
            yield group
            group, held = {}, 0
        group[name] = tensor
        held += tensor.nbytes
    yield group


@contextmanager
def new_folder(output: Path, size: int) -> Iterator[Path]:
    """Make a folder beside `output` that may become it, and is removed if not.

    Raises:
        ConversionError: output exists, lies inside a checkpoint, or has no room for `size` bytes.
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


def write_files(
    folder: Path,
    files: Mapping[str, Mapping[str, torch.Tensor]],
    read: Callable[[str], Iterable[torch.Tensor | bytes]],
    metadata: Mapping[str, str] | None = None,
) -> list[ManifestPart]:
    """Write files of whole tensors, with progress on stderr.

    Args:
        folder: where the files are made.
        files: outlines of the tensors by name, by file.
        read: gives the values of the tensor with this name, piece by piece.
        metadata: free texts for the headers.

    Returns:
        What a manifest has to say about each file.
    """
    parts, console = [], Console(stderr=True)
    bar = partial(track, console=console, transient=True, disable=not console.is_terminal)
    for file, tensors in bar(files.items(), "Writing"):
        with TensorFileWriter(folder / file, tensors, metadata) as writer:
            for name in by_alignment(tensors):
                for values in read(name):
                    writer.write(values)
        boxes = {name: Box.whole(tensor) for name, tensor in tensors.items()}
        parts.append(manifest_part(file, writer.facts, boxes))
        print(f"{file}: {len(tensors)} tensors, {writer.size:,} bytes", file=sys.stderr)
    return parts


def warn(texts: Sequence[str]) -> None:
    """Print warnings on stderr."""
    for text in texts:
        print(f"convert_hf: WARNING: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
