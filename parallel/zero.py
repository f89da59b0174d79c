"""ZeRO through FSDP2, and in one process fp32 masters, a compute dtype, gradients summed in fp32.

The loss is divided by the global batch's target tokens, so every gradient is a plain sum over the ranks.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from model.transformer import Transformer
from parallel.mesh import Mesh
from parallel.placement import Shard


def apply_zero(model: Transformer, mesh: Mesh, *, stage: int, dtype: torch.dtype) -> None:
    """Wrap each router gate (fp32), each block and the rest on the data-parallel axis, if there is one.

    Args:
        stage: 3 frees the gathered parameters after each forward; 1 and 2 keep them until backward.
        dtype: what the model computes in; gradients are reduced in fp32.
    """
    if mesh.dp is None:
        return
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    wide = dataclasses.replace(policy, param_dtype=torch.float32)
    options: dict[str, Any] = {"mesh": mesh.dp, "reshard_after_forward": stage == 3}
    for router in model.routers():
        fully_shard(router.gate, mp_policy=wide, **options)
    for block in model.blocks.values():
        fully_shard(block, mp_policy=policy, **options)
    fully_shard(model, mp_policy=policy, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM


def sync_gradients(model: Transformer, on: bool) -> None:
    """Whether the next backward reduces gradients over the ranks or keeps them for a later one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)


def copy_for_compute(shards: list[Shard], mesh: Mesh, dtype: torch.dtype) -> None:
    """In one process, let the model compute in `dtype` beside fp32 masters; router gates stay fp32.

    A hook adds each micro-batch's gradient to the master's fp32 one and frees it, as FSDP2 does.
    """
    if mesh.dp is not None or dtype == torch.float32:
        return
    for shard in shards:
        if ".router.gate." in shard.name:
            continue
        shard.parameter.data = shard.master.to(dtype)
        shard.parameter.register_post_accumulate_grad_hook(_accumulate_into(shard.master))


def _accumulate_into(master: Tensor) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    return add
