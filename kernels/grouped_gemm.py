"""One GEMM per expert on rows sorted by expert; group sizes stay on the device where torch can."""

import logging
from functools import cache

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
    if x.shape[-1] != weight.shape[-1] or ends.numel() != weight.shape[0]:
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and {ends.numel()} groups do not fit"
        )
    if x.dtype != torch.float64 and all(size * x.element_size() % 16 == 0 for size in weight.shape[1:]):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    _say_slow(tuple(weight.shape), x.dtype)
    return grouped_gemm_by_expert(x, weight, ends)


@cache
def _say_slow(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    log.warning(
        "grouped GEMM on %s %s runs expert by expert: not <= fp32 with sizes of 16 bytes", shape, dtype
    )
