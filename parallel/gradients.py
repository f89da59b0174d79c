"""Where all gradients of a rank meet: summed in fp32 beside the masters, whatever way they came.

The norm and the optimizer read them there; each element of the model counts once.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kernels.adamw import square_sum
from model.moe import Experts
from parallel.collectives import Axis, all_gather, all_reduce_sum
from parallel.placement import Shard


class Gradients:
    """The gradients of this rank's masters, `shard.master.grad`: fp32, [local shape], plain sums.

    Each parameter takes one of these routes there, by what the model computes with (`shard.parameter`):

    | the model computes with | who brings its gradient | when |
    |---|---|---|
    | a DTensor of FSDP2 | FSDP2 reduces it; `collect` takes the local part | once a step |
    | the master itself | autograd; `collect` takes `parameter.grad` | once a step |
    | a copy of the master | a hook calls `add` and frees what autograd left | each backward |
    | a copy, of experts whose GEMMs add | the GEMM, unrounded, into `buffer` | each backward |
    | a copy, where backward is split in two | no hook runs, so `collect` calls `add` | once a step |

    A copy is rounded or on another device. Last, `collect` sums over the tp ranks that hold the same part.
    """

    def __init__(self, shards: Sequence[Shard], tp: Axis) -> None:
        """Lay the routes, but for that through GEMMs; call it after the copies are made."""
        self.shards, self.tp = shards, tp
        for shard in shards:
            if shard.is_copied:
                shard.parameter.register_post_accumulate_grad_hook(partial(self._take, shard.master))

    def add_in_gemms(self, parts: Iterable[nn.Module]) -> None:
        """Let the GEMMs of experts with copies on the masters' device write into `buffer`.

        Only for a backward pass that runs once and as a whole.
        """
        copied = {s.parameter: s.master for s in self.shards if s.is_copied}
        for experts in (m for part in parts for m in part.modules() if isinstance(m, Experts)):
            weights = experts.gate_up, experts.down
            if experts.gate_up in copied and copied[experts.gate_up].device == experts.gate_up.device:
                first, second = (partial(self.buffer, copied[weight]) for weight in weights)
                experts.master_grads = first, second

    @staticmethod
    def add(master: Tensor, grad: Tensor) -> None:
        """Add a gradient, perhaps rounded or on another device, to the master's in fp32."""
        if master.grad is None:
            master.grad = grad.to(master.device, torch.float32)
        else:
            master.grad += grad.to(master.device)  # widened as it is read, not by a copy

    @staticmethod
    def buffer(master: Tensor) -> tuple[Tensor, bool]:
        """Return the master's gradient to write into, and whether to add to what it holds."""
        adds = master.grad is not None
        if master.grad is None:
            master.grad = torch.empty_like(master)
        return master.grad, adds

    @staticmethod
    def _take(master: Tensor, parameter: Tensor) -> None:
        if parameter.grad is not None:  # None: its GEMM has added it
            Gradients.add(master, parameter.grad)
            parameter.grad = None

    def collect(self) -> None:
        """End the routes of a step: each master has its gradient, summed over the ranks that share it."""
        for shard in self.shards:
            grad = shard.parameter.grad
            if not shard.is_copied:
                shard.master.grad = grad.to_local() if isinstance(grad, DTensor) else grad
            elif grad is not None:
                self.add(shard.master, grad)
        for share in {shard.share for shard in self.shards} - {1}:
            self._sum_shared(share)

    def _sum_shared(self, share: int) -> None:
        """Sum gradients over each `share` consecutive tp ranks, all of them in one collective."""
        masters = [shard.master for shard in self.shards if shard.share == share]
        grads = [master.grad for master in masters if master.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        if share == self.tp.size:
            flat = all_reduce_sum(flat, self.tp)
        else:
            flat = all_gather(flat[None], self.tp).view(-1, share, flat.numel())[self.tp.rank // share].sum(0)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def _collected(self) -> list[Tensor]:
        missing = [shard.name for shard in self.shards if shard.master.grad is None]
        assert not missing, f"no gradient reached {missing}"
        return [shard.master.grad for shard in self.shards if shard.master.grad is not None]

    def square_sum(self) -> Tensor:
        """Return this rank's part of the square sum, an fp64 scalar; the caller sums it over all ranks.

        In fp32 the CPU's serial sum is off by 1e-4 on half a million elements, for every sharding otherwise.
        """
        return square_sum(self._collected(), [shard.share for shard in self.shards])

    def scale(self, factor: float) -> None:
        """Multiply all gradients, in place."""
        torch._foreach_mul_(self._collected(), factor)

    def drop(self) -> None:
        """Free all gradients."""
        for shard in self.shards:
            shard.parameter.grad = shard.master.grad = None


def clip_factor(norm: float, max_norm: float) -> float:
    """Return what brings gradients of this norm down to max_norm, at most 1."""
    return max_norm / norm if norm > max_norm else 1.0
