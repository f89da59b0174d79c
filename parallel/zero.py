"""ZeRO through FSDP2 over the data axes; elsewhere fp32 masters, a compute dtype, gradients summed in fp32.

The loss is divided by the global batch's target tokens, so every gradient is a plain sum over the ranks.
"""

import dataclasses
import subprocess
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as DimShard

from model.transformer import Block, Transformer
from parallel.config import Offload
from parallel.mesh import Mesh
from parallel.placement import Shard


def apply_zero(
    model: Transformer, mesh: Mesh, *, stage: int, dtype: torch.dtype, offload: Offload = Offload.none
) -> None:
    """Wrap experts on edp, each router gate (fp32), each block and the rest on dp x cp, where the axes exist.

    Args:
        stage: 3 frees the gathered parameters after each forward; 1 and 2 keep them for the whole step.
        dtype: what the model computes in; gradients are reduced in fp32.
        offload: `cpu` keeps parameters and reduced gradients in host memory.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    wide = dataclasses.replace(policy, param_dtype=torch.float32)
    options: dict[str, Any] = {"reshard_after_forward": stage == 3, "mp_policy": policy}
    if offload is Offload.cpu:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda")
    blocks = _blocks(model)
    if mesh.expert_data_mesh is not None:
        for block in blocks:
            where: dict[str, Any] = {
                "mesh": mesh.expert_data_mesh,
                "shard_placement_fn": _expert_placement(mesh.edp.size),
            }
            fully_shard(block.moe.experts, **where, **options)
    if mesh.data_mesh is not None:
        options |= {"mesh": mesh.data_mesh}
        if mesh.expert_data_mesh is None:
            options["ignored_params"] = {p for block in blocks for p in block.moe.experts.parameters()}
        for router in model.routers():
            fully_shard(router.gate, **{**options, "mp_policy": wide})
        for module in (*blocks, model):
            fully_shard(module, **options)
    for wrapped in _wrapped(model):
        wrapped.set_gradient_divide_factor(1.0)
        wrapped.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM


def _expert_placement(edp: int) -> Callable[[nn.Parameter], DimShard]:
    """Whole experts if each edp rank gets one; else parts of gate_up [e, 2, ffn, h] and down [e, h, ffn]."""

    def place(parameter: nn.Parameter) -> DimShard:
        return DimShard(0 if parameter.shape[0] >= edp else parameter.dim() - 2)

    return place


def _blocks(model: Transformer) -> list[Block]:
    return [block for block in model.blocks.values() if isinstance(block, Block)]


def _wrapped(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def prepare_backward(model: Transformer, *, reduces: bool, frees: bool) -> None:
    """Whether the next backward reduces gradients over the ranks or keeps them for a later one.

    Args:
        frees: it also frees the gathered parameters, which the next forward has to gather again.
    """
    for module in _wrapped(model):
        module.set_requires_gradient_sync(reduces, recurse=False)
        module.set_reshard_after_backward(frees, recurse=False)


def materialize(model: Transformer, mesh: Mesh, offload: Offload) -> None:
    """Give a model on the meta device memory: masters on the host if offloaded, buffers on the device."""
    model.to_empty(device="cpu" if offload is Offload.cpu else mesh.device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(mesh.device))
    model.reset_buffers()


def copy_for_compute(shards: list[Shard], device: torch.device, dtype: torch.dtype) -> None:
    """Let parameters that FSDP2 does not hold compute in `dtype` (router gates: fp32) beside fp32 masters."""
    for shard in shards:
        target = torch.float32 if ".router.gate." in shard.name else dtype
        is_same = target == torch.float32 and shard.master.device.type == device.type
        if not isinstance(shard.parameter, DTensor) and not is_same:
            shard.parameter.data = shard.master.to(device, target)


def build_cpu_adam(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """DeepSpeed's AdamW for masters on the host; its extension is compiled at first use.

    Raises:
        RuntimeError: deepspeed is missing, or its extension cannot be compiled here.
    """
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, fp32_optimizer_states=True, **options)
    except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            "optimizer.offload=cpu needs deepspeed, and a C++ compiler and ninja to build its CPU Adam; "
            f"install them or set optimizer.offload=none: {error}"
        ) from error
