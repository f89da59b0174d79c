"""The only place where weights get values.

Every value is a function of (seed, parameter name, expert, index) alone: any rank can make any slice, and
any layout starts from the same weights. Xavier normal per logical matrix, DeepNorm's gain (arXiv 2501.08313
sec. 4.2).
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from model.config import ModelConfig
from model.hashing import mix

CHUNK = 2**22
"""Values made at once: bounds the temporary memory."""


def init_slice(
    out: Tensor, name: str, *, shape: Sequence[int], offset: Sequence[int], cfg: ModelConfig, seed: int
) -> None:
    """Fill `out` with the values that parameter `name` has in the box that begins at `offset`.

    Args:
        out: a local part of the parameter, contiguous, any number of dims, written in place.
        shape: global shape of the parameter.
        offset: global index of out's first element in each dim.
    """
    if len(shape) == 1:
        out.fill_(1.0)
        return
    if ".experts." in name:
        for i in range(out.shape[0]):
            _fill(out[i], f"{name}/{offset[0] + i}", shape[1:], offset[1:], seed)
    else:
        _fill(out, name, shape, offset, seed)
    out.mul_(_scale(out, name, shape, offset, cfg))


def _scale(
    out: Tensor, name: str, shape: Sequence[int], offset: Sequence[int], cfg: ModelConfig
) -> Tensor | float:
    """Standard deviation of each element: gain * sqrt(2 / (fan_in + fan_out)) of its logical matrix."""
    gain = (8 * cfg.num_layers) ** -0.25
    fan_out, fan_in = shape[-2], shape[-1]
    if name.endswith("mixer.qkv.weight"):  # three matrices, interleaved per head; v alone takes the gain
        std = math.sqrt(2 / (fan_out // 3 + fan_in))
        rows = torch.arange(offset[0], offset[0] + out.shape[0], device=out.device)
        is_v = rows // cfg.head_dim % 3 == 2
        return (std * torch.where(is_v, gain, 1.0))[:, None].to(out.dtype)
    gained = (".mixer.v.", ".mixer.out.", ".experts.")
    std = math.sqrt(2 / (fan_out + fan_in))
    return std * (gain if any(part in name for part in gained) else 1.0)


def _fill(out: Tensor, key: str, shape: Sequence[int], offset: Sequence[int], seed: int) -> None:
    """Standard normal values of the box of `out` in a tensor of `shape`, by flat index."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    keys = [int.from_bytes(digest[i : i + 8], "little", signed=True) for i in (0, 8)]
    columns = math.prod(out.shape[1:])
    inner = torch.zeros((), dtype=torch.int64, device=out.device)
    for size, length, start in zip(shape[1:], out.shape[1:], offset[1:], strict=True):
        inner = inner[..., None] * size + torch.arange(start, start + length, device=out.device)
    rows_at_once = max(1, CHUNK // max(1, columns))
    for first in range(0, out.shape[0], rows_at_once):
        part = out[first : first + rows_at_once]
        start = offset[0] + first
        rows = torch.arange(start, start + part.shape[0], device=out.device)
        index = rows[:, None] * math.prod(shape[1:]) + inner.reshape(1, -1)
        part.copy_(_normal(index, keys).view_as(part))


def _normal(index: Tensor, keys: list[int]) -> Tensor:
    """Box-Muller on 2 x 32 hashed bits of each index; in fp64, which hides the device's libm."""
    bits = mix(mix(index + keys[0]) ^ keys[1])
    low = (bits & 0xFFFFFFFF).double()
    high = ((bits >> 32) & 0xFFFFFFFF).double()
    return torch.sqrt(-2 * torch.log((high + 0.5) / 2**32)) * torch.cos(2 * math.pi / 2**32 * low)
