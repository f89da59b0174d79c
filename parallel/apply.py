"""The one place where a plain model becomes a parallel one."""

import torch

from model.init import init_slice
from model.transformer import Transformer
from parallel.collectives import PoolOverRanks
from parallel.config import ParallelConfig
from parallel.mesh import Mesh
from parallel.placement import Shard, local_shards, publish
from parallel.zero import apply_zero, copy_for_compute


def parallelize(
    model: Transformer, mesh: Mesh, cfg: ParallelConfig, *, dtype: torch.dtype, seed: int
) -> list[Shard]:
    """Spread a model that lies on the meta device over the mesh and give it its initial weights.

    Args:
        dtype: what the model computes in.
        seed: of the weights.

    Returns:
        This rank's part of every parameter.
    """
    if mesh.dp is not None:
        for router in model.routers():
            router.pool = PoolOverRanks(mesh)
    apply_zero(model, mesh, stage=cfg.zero_stage, dtype=dtype)
    model.to_empty(device=mesh.device)
    model.reset_buffers()
    shards = local_shards(model)
    for shard in shards:
        init_slice(shard.master, shard.name, shape=shard.shape, offset=shard.offset, cfg=model.cfg, seed=seed)
    copy_for_compute(shards, mesh, dtype)
    publish(shards)
    return shards
