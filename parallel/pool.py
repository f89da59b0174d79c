"""The ranks that share a micro-batch, as the router sees them: dp x cp x tp = edp x ep x etp of a stage."""

import torch
from torch import Tensor

from model.capacity import LocalPool, Places, locate
from parallel.collectives import all_gather, all_reduce_sum
from parallel.context import zigzag
from parallel.mesh import Mesh


class StagePool(LocalPool):
    """`model.capacity.Pool` over a pipeline stage; EP groups that exchange choices share a capacity."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.stage, self.dp, self.cp, self.tp = mesh.stage, mesh.dp, mesh.cp, mesh.tp
        self.size, self.num_groups = mesh.stage.size, mesh.exchange.size // mesh.ep.size
        self.group_size = mesh.ep.size * mesh.etp.size
        sharing = self.num_groups * self.group_size
        first = mesh.stage.rank // sharing * sharing
        self.rank, self.peers = mesh.stage.rank - first, slice(first, first + sharing)

    def _locate(self, rows: int, tokens: int, device: torch.device) -> Places:
        row_tokens = tokens * self.cp.size * self.tp.size
        mine = zigzag(torch.arange(row_tokens, device=device), self.cp, dim=0)
        numbers = torch.arange(self.dp.rank * rows, (self.dp.rank + 1) * rows, device=device)
        mine = mine.chunk(self.tp.size)[self.tp.rank]
        return locate(numbers, mine, rows * self.dp.size, row_tokens)

    def sum(self, counts: Tensor) -> Tensor:
        """Over the stage. all-reduce; no gradient."""
        return all_reduce_sum(counts, self.stage)

    def gather(self, table: Tensor) -> Tensor:
        """[...] -> [ranks, ...]. all-gather; no gradient."""
        return all_gather(table[None], self.stage)
