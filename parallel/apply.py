"""The one place where a plain model becomes a parallel one: TP -> EP/ETP -> CP -> recompute -> ZeRO."""

from collections.abc import Sequence

import torch

from model.config import ModelConfig, RouterConfig
from model.flops import forward_flops_per_token
from model.init import init_slice
from model.transformer import Transformer
from parallel.config import SPLIT_BACKWARD, Offload, ParallelConfig, Recompute, num_stages, stages_of
from parallel.context import apply_context
from parallel.expert import apply_expert
from parallel.gradients import Gradients
from parallel.mesh import Mesh
from parallel.pipeline import split_layers
from parallel.placement import Shard, local_shards, publish
from parallel.pool import StagePool
from parallel.recompute import apply_recompute
from parallel.tensor import apply_tensor
from parallel.zero import apply_zero, copy_for_compute, materialize


def build_parts(
    model_cfg: ModelConfig, cfg: ParallelConfig, mesh: Mesh, *, row_tokens: int,
    router: RouterConfig | None = None,
) -> list[Transformer]:  # fmt: skip
    """This rank's pipeline stages on the meta device, cut to cost alike; one whole model without pp.

    Args:
        row_tokens: context length, on which the softmax layers' cost depends.
    """
    layers, head = forward_flops_per_token(model_cfg, row_tokens)
    stages = split_layers([*layers[:-1], layers[-1] + head], num_stages(cfg.schedule, mesh.pp.size))
    mine = stages_of(mesh.pp.rank, cfg.schedule, mesh.pp.size)
    with torch.device("meta"):
        return [Transformer(model_cfg, stages[number], router=router) for number in mine]


def parallelize(
    parts: Sequence[Transformer], mesh: Mesh, cfg: ParallelConfig, *, dtype: torch.dtype, seed: int,
    recompute: Recompute = Recompute.none, offload: Offload = Offload.none, overlap_groups: int = 1,
) -> tuple[list[Shard], Gradients]:  # fmt: skip
    """Spread this rank's stages, on the meta device, over the mesh and give them their initial weights.

    Args:
        dtype: what the model computes in.
        seed: of the weights.
        recompute: what blocks compute again in backward.
        offload: where masters lie.
        overlap_groups: groups of tokens whose way to the experts overlaps.

    Returns:
        This rank's part of every parameter of its stages, and where their gradients meet.
    """
    shards, pool = [], StagePool(mesh)
    for model in parts:
        placements = apply_tensor(model, mesh.tp)
        placements |= apply_expert(model, mesh, overlap_groups=overlap_groups)
        apply_context(model, mesh.cp, exchange=cfg.cp_state_exchange)
        for router in model.routers():
            router.seed = seed
            router.pool = pool
        apply_recompute(model, mesh.cp, recompute)
        apply_zero(model, mesh, stage=cfg.zero_stage, dtype=dtype, offload=offload)
        materialize(model, mesh, offload)
        shards += local_shards(model, placements, mesh.tp)
    for shard in shards:
        where = {"shape": shard.shape, "offset": shard.offset}
        init_slice(shard.master, shard.name, cfg=parts[0].cfg, seed=seed, **where)
    copy_for_compute(shards, mesh.device, dtype)
    gradients = Gradients(shards, mesh.tp)
    if cfg.schedule not in SPLIT_BACKWARD:
        gradients.add_in_gemms(parts)
    publish(shards)
    return shards, gradients
