"""Folders as Hugging Face checkpoints have them, of random small models."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import LayerType, ModelConfig
from scripts.convert_hf import main
from scripts.hf.config import Layout, write_config
from scripts.hf.names import hf_tensors
from tests.support.transformers_models import make_config

L, S = LayerType.lightning, LayerType.softmax

PATTERNS = [[L, L, L, S], [S, L], [L, L], [S], [L, S, L]]


def random_config(number: int, **changes: Any) -> ModelConfig:
    """Odd shapes, layer patterns and vocabularies; rotary_dim is what transformers can do, all of a head."""
    rng = random.Random(number)
    layers = PATTERNS[number % len(PATTERNS)]
    heads = rng.choice([2, 3, 4, 6])
    head_dim = rng.choice([4, 6, 10, 16])
    experts = rng.randint(2, 5)
    sizes = {
        "num_layers": len(layers), "layer_types": layers, "num_heads": heads, "head_dim": head_dim,
        "num_kv_heads": rng.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        "hidden_size": rng.choice([18, 30, 44, 52]), "vocab_size": rng.randint(20, 150),
        "num_experts": experts, "experts_per_token": rng.randint(1, min(3, experts)),
        "expert_ffn_size": rng.choice([9, 14, 20]), "rotary_dim": head_dim,
        "norm_eps": rng.choice([1e-5, 1e-6]), "residual_alpha": rng.choice([None, 1.25]),
        "rope_theta": rng.choice([1e4, 777.0]),
    }  # fmt: skip
    return make_config(**{**sizes, **changes})


def write_folder(
    folder: Path, cfg: ModelConfig, layout: Layout, dtype: torch.dtype, files: int = 1
) -> dict[str, Tensor]:
    """A Hugging Face folder with random weights, gates in fp32 in text01; the tensors."""
    draw = torch.Generator().manual_seed(len(folder.name))
    tensors = {}
    for piece in hf_tensors(cfg):
        kept = torch.float32 if piece.is_gate and layout is Layout.text01 else dtype
        tensors[piece.name] = torch.randn(piece.shape, generator=draw).to(kept)
    folder.mkdir(parents=True)
    config, _ = write_config(
        cfg, layout, dtype=str(dtype).removeprefix("torch."), carried={"eos_token_id": 3}
    )
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return tensors
    places = {name: f"model-{n * files // len(names)}.safetensors" for n, name in enumerate(names)}
    for file in set(places.values()):
        some = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        save_file(some, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return tensors


def read_folder(folder: Path) -> dict[str, Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    return found


def same_bytes(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == tensor.dtype and torch.equal(mine[name], tensor)
        for name, tensor in theirs.items()
    )


def convert(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def edit_config(key: str, value: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: value}))

    return edit
