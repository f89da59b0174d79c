"""Copies a tokenizer: into the checkpoint of an import; from there, or from the data, into an export."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.tokenizer import eos_id, load_tokenizer, tokenizer_file
from scripts.hf.config import ConversionError
from train.checkpoint.manifest import TOKENIZER, Manifest

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


def copy_tokenizer(source: Path, target: Path) -> dict[str, dict[str, Any]]:
    """Copy the files that there are.

    Returns:
        Size and hash by name.
    """
    found = {}
    for name in FILES:
        if (source / name).is_file():
            target.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
            data = (target / name).read_bytes()
            found[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return found


def export_tokenizer(
    manifest: Manifest, target: Path, given: Path | None
) -> tuple[dict[str, Any], list[str]]:
    """Copy the tokenizer of a checkpoint: `given`, else its own, else its data's.

    Returns:
        Keys of config.json that are known beside the model's, and what is missing.

    Raises:
        ConversionError: `given` is no tokenizer, or a file of the checkpoint is not as it was written.
    """
    source, config = manifest.folder, manifest.config
    carried = dict(manifest.part("hf_config")) if "hf_config" in manifest.facts else {}
    if "batch" in config:
        carried.setdefault("max_position_embeddings", config["batch"]["row_tokens"])
    if given is None and (source / TOKENIZER).is_dir():
        copied = copy_tokenizer(source / TOKENIZER, target)
        for name, facts in manifest.part(TOKENIZER).items():
            if copied.get(name) != facts:
                raise ConversionError(
                    f"{source / TOKENIZER / name}: is {copied.get(name)}, the manifest says {facts}; "
                    "give --tokenizer"
                )
        return carried, []
    file, end = (given, None) if given is not None else _of_the_data(config.get("data", {}))
    if file is None:
        remedy = "the export has none; give --tokenizer DIR_OR_FILE"
        return carried, [f"{source}: neither holds a tokenizer nor names data that do; {remedy}"]
    try:
        tokenizer = load_tokenizer(file)
        end = eos_id(tokenizer) if end is None else end
    except ValueError as error:
        raise ConversionError(str(error)) from error
    if file.is_dir():
        copy_tokenizer(file, target)
    shutil.copyfile(tokenizer_file(file), target / "tokenizer.json")
    if not (target / "tokenizer_config.json").exists():
        words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.id_to_token(end)}
        (target / "tokenizer_config.json").write_text(json.dumps(words, indent=2) + "\n", encoding="utf-8")
    carried.setdefault("eos_token_id", end)
    return carried, []


def _of_the_data(data: Mapping[str, Any]) -> tuple[Path | None, int | None]:
    """Find tokenizer and end-of-document token of a run's first source that tells them."""
    for source in data.get("sources", []):
        about = Path(f"{source['path']}.json")
        if source["path"] is not None and about.is_file():
            facts = json.loads(about.read_text(encoding="utf-8"))
            if "tokenizer" in facts and (file := about.with_name(facts["tokenizer"]["file"])).is_file():
                return file, facts["eos_id"]
    named = data.get("tokenizer")
    return (Path(named), None) if named is not None and tokenizer_file(named).is_file() else (None, None)
