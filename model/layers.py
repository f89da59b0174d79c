"""Small modules that both mixers and the transformer share."""

import torch
from torch import Tensor, nn

from kernels.gated_norm import gated_rms_norm
from kernels.rms_norm import Carried, carry_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return rms_norm(x, self.weight, self.eps)


class ResidualNorm(nn.Module):
    """h = RMSNorm(x); h is the residual, too: alpha * h is carried to the sum behind the next branch."""

    def __init__(self, size: int, eps: float, alpha: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.alpha = eps, alpha

    def forward(self, x: Tensor, carried: Carried | None = None) -> tuple[Tensor, Carried]:
        """x, or carried + x, [..., size] -> (h [..., size], alpha * h for `add_carried` or the next norm)."""
        return carry_rms_norm(x, self.weight, self.eps, self.alpha, carried)


class GatedRMSNorm(nn.Module):
    """sigmoid(gate) * RMSNorm(x) over the last dim."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """[..., size] twice -> [..., size]."""
        return gated_rms_norm(x, gate, self.weight, self.eps)


def linear(in_size: int, out_size: int) -> nn.Linear:
    """A linear map without bias: MiniMax-01 has no other."""
    return nn.Linear(in_size, out_size, bias=False)
