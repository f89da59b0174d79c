"""One GEMM per expert on rows sorted by expert; group sizes stay on the device where torch can."""

import logging
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference import grouped_gemm as grouped_gemm_by_expert

log = logging.getLogger(__name__)


def grouped_gemm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """[tokens, in] x [experts, out, in]^T -> [tokens, out]; expert e owns the rows up to ends[e].

    Args:
        x: [tokens, in], sorted by expert.
        weight: [experts, out, in].
        ends: [experts] int32, cumulative.
    """
    check_groups(x, weight, ends)
    if fits_grouped_mm(x, weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    _say_slow(tuple(weight.shape), x.dtype)
    return grouped_gemm_by_expert(x, weight, ends)


def check_groups(x: Tensor, weight: Tensor, ends: Tensor) -> None:
    """Raise a ValueError where x [tokens, in], weight [experts, ..., in] and ends [experts] do not fit."""
    if x.shape[-1] != weight.shape[-1] or ends.numel() != weight.shape[0]:
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and {ends.numel()} groups do not fit"
        )


def fits_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's op takes the dtype and the sizes: rows of all operands are multiples of 16 bytes."""
    return x.dtype != torch.float64 and all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])


def is_wanted(ctx: Any, number: int) -> bool:
    """Whether this run of the engine asks for the gradient of a Function's input, which must not be a leaf.

    A schedule that splits the backward asks for the gradients of inputs and of weights in two runs, and a
    Function that always computes both does each twice.
    """
    node = ctx.next_functions[number][0]
    return node is not None and torch._C._will_engine_execute_node(node)


@cache
def _say_slow(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    log.warning(
        "grouped GEMM on %s %s runs expert by expert: not <= fp32 with sizes of 16 bytes", shape, dtype
    )
