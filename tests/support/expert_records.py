"""Records of a run with four experts in two layers, one of which is dead, and pixels of their heat maps."""

from typing import Any

from PIL import Image

from train.monitor.heat_maps import BOTTOM, LEFT, TOP

LOAD = [[20, 10, 0, 50], [20, 20, 20, 20]]


def record_of(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": step * 4096,
        "loss": 2.5,
        "aux_loss": 1.25,
        "grad_norm": 0.5,
        "lr": 3e-4,
        "tokens_per_second": 1000.0,
        "mfu": None,
        "max_memory_gib": None,
        "drop_rate": 0.0,
        "moved_rate": 0.125,
        "router_entropy": 1.375,
        "z_loss": 0.75,
        "max_violation": 1.5,
        "skipped": 0,
        "stage": step // 4,
        "row_tokens": 256,
        "checkpoint_age_steps": step - 1,
        "spike_score": None,
        **changes,
    }


def experts_of(step: int, load: Any = LOAD, **changes: Any) -> dict[str, Any]:
    layers, experts = len(load), len(load[0])
    return {
        "step": step,
        "load": load,
        "dropped": [[0] * experts] * layers,
        "moved": [20, 0],
        "max_violation": [1.5, 0.0],
        "entropy": [1.25, 1.5],
        "aux_loss": [1.5, 1.0],
        **changes,
    }


def between(a: tuple[int, ...], b: tuple[int, ...], share: float) -> tuple[int, ...]:
    return tuple(round(x + share * (y - x)) for x, y in zip(a, b, strict=True))


def cells(picture: Image.Image, layers: int, experts: int) -> list[list[Any]]:
    """The colour inside each cell; the cells fill what the margins leave."""
    size = (picture.height - TOP - BOTTOM) // layers
    pixels = picture.convert("RGB")
    return [
        [pixels.getpixel((LEFT + c * size + size // 2, TOP + r * size + size // 2)) for c in range(experts)]
        for r in range(layers)
    ]
