"""Loads a checkpoint of any layout as one model in one process, and the tokenizer of its run."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from data.tokenizer import EOS_TOKENS, load_tokenizer, vocab_size
from model.config import Balancing, LayerType, ModelConfig, RouterConfig, SlopeRule
from model.transformer import Transformer
from train.checkpoint.manifest import Manifest, read_manifest
from train.checkpoint.restore import read_boxes
from train.checkpoint.storage import Box, CheckpointError, find_checkpoints

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def open_checkpoint(path: Path) -> Manifest:
    """Read the manifest of a step folder, or of the newest one in a run directory.

    Raises:
        CheckpointError: there is no checkpoint, or it names no model.
    """
    folder = next(iter(find_checkpoints(path / "checkpoints", complete=True)), path)
    manifest = read_manifest(folder)
    if "model" not in manifest.config:
        raise CheckpointError(f"{folder}: its manifest has no config.model; save it again with this version")
    return manifest


def model_config(checkpoint: Manifest) -> ModelConfig:
    """Build the model's configuration from a manifest.

    Raises:
        CheckpointError: this version cannot build the model.
    """
    values = dict(checkpoint.config["model"])
    try:
        if values.get("layer_types") is not None:
            values["layer_types"] = [LayerType(kind) for kind in values["layer_types"]]
        if "slope_rule" in values:
            values["slope_rule"] = SlopeRule(values["slope_rule"])
        return ModelConfig(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.folder}: config.model is not of this version: {error}") from error


def load_model(checkpoint: Manifest, *, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Load the whole model in evaluation mode, its weights read box by box; router gates stay fp32.

    Raises:
        CheckpointError: this version cannot build the model, or a tensor is missing.
    """
    cfg = model_config(checkpoint)
    try:
        balancing = checkpoint.config.get("router", {}).get("balancing", Balancing.aux_loss)
        router = RouterConfig(balancing=Balancing(balancing))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.folder}: config.router is not of this version: {error}"
        ) from error
    with torch.device("meta"):
        model = Transformer(cfg, router=router)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            kept = torch.float32 if path.endswith("router.gate") else dtype
            setattr(module, name, nn.Parameter(parameter.to(kept), requires_grad=False))
    model.to_empty(device=device)
    model.reset_buffers()
    tensors = {f"model.{name}": parameter.data for name, parameter in model.named_parameters()}
    if router.balancing is Balancing.bias:
        tensors |= {f"router.bias.{router.layer}": router.bias for router in model.routers()}
    read_boxes(checkpoint, {name: Box.whole(tensor) for name, tensor in tensors.items()})
    return model.eval()


def find_tokenizer(checkpoint: Manifest, given: Path | None) -> "Tokenizer":
    """Load the tokenizer that was given, else that of the checkpoint, else that of the run's data.

    Raises:
        ValueError: the tokenizer is not there, or knows more tokens than the model.
    """
    data = checkpoint.config.get("data") or {}
    own, prefix = checkpoint.folder / "tokenizer", _first_source(checkpoint)
    named = data.get("tokenizer") or (prefix and f"{prefix}.tokenizer.json")
    file = given or (own if own.is_dir() else named)
    if not file:
        raise ValueError(f"{checkpoint.folder} names no tokenizer; give one: --tokenizer FILE_OR_FOLDER")
    tokenizer = load_tokenizer(Path(file))
    size, limit = vocab_size(tokenizer), checkpoint.config["model"]["vocab_size"]
    if size > limit:
        raise ValueError(
            f"tokenizer {file} has {size} ids, the model {limit}; give the run's own: --tokenizer"
        )
    return tokenizer


def end_token(checkpoint: Manifest, tokenizer: "Tokenizer", name: str | None) -> int | None:
    """Find the id of the token that ends a document.

    It is that of `name`, else that of the run's data, else that of a usual name, else None.

    Raises:
        ValueError: `name` is no token.
    """
    if name:
        found = tokenizer.token_to_id(name)
        if found is None:
            raise ValueError(f"--eos-token {name} is no token of the tokenizer; name one that is")
        return found
    manifest = Path(f"{_first_source(checkpoint)}.json")
    if (
        manifest.is_file()
        and (end := json.loads(manifest.read_text(encoding="utf-8")).get("eos_id")) is not None
    ):
        return end
    known = (tokenizer.token_to_id(token) for token in EOS_TOKENS)
    return next((token for token in known if token is not None), None)


def _first_source(checkpoint: Manifest) -> str | None:
    """Look up the PREFIX of the run's first data source; None if it is text, or there is no run."""
    data = checkpoint.config.get("data") or {}
    return (data.get("sources") or [{}])[0].get("path")


def choose_device(name: str) -> torch.device:
    """Choose a device by name; `auto` = a GPU where there is one.

    Raises:
        ValueError: cuda was asked for and is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no GPU; use --device auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Choose a dtype: the one asked for, else bf16 on a GPU, for which the kernels are, else fp32."""
    return DTYPES[name or ("bf16" if device.type == "cuda" else "fp32")]
