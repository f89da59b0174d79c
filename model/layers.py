"""Small modules that both mixers and the transformer share."""

import torch
from torch import Tensor, nn

from kernels.reference import rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return rms_norm(x, self.weight, self.eps)


def linear(in_size: int, out_size: int) -> nn.Linear:
    """A linear map without bias: MiniMax-01 has no other."""
    return nn.Linear(in_size, out_size, bias=False)
