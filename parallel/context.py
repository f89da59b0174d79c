"""Context parallelism: rows cut into 2 cp chunks, of which rank r owns chunks r and 2 cp - 1 - r.

Both kinds of attention use this zigzag layout: the ring of `parallel/ring.py`, and the prefix states below,
LASP+ (MiniMax-01, arXiv 2501.08313) with documents and fixed decay.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.documents import Documents, locate_documents
from kernels.lightning_attention import lightning_attention, lightning_end_state
from model.attention import SoftmaxAttention, SoftmaxCore
from model.lightning import LightningAttention, LightningCore
from model.router import Memo
from model.transformer import Transformer
from parallel.collectives import Axis
from parallel.config import StateExchange
from parallel.overlap import post, wait
from parallel.ring import RingCore, by_chunk, from_chunks, owned_chunks


def apply_context(model: Transformer, cp: Axis, *, exchange: StateExchange = StateExchange.allgather) -> None:
    """Make a model whose heads are already cut over tp compute on this rank's chunks of each row."""
    if cp.group is None:
        return
    model.locate = ZigzagLocator(cp)
    for module in list(model.modules()):
        match module:
            case LightningAttention(core=LightningCore() as core):
                module.core = PrefixStateCore(core, cp, exchange=exchange)
            case SoftmaxAttention(core=SoftmaxCore()):
                module.core = RingCore(cp)


def zigzag(x: Tensor, cp: Axis, *, dim: int = 1) -> Tensor:
    """This rank's two chunks of full rows, one after the other: [..., tokens, ...] -> [..., tokens/cp, ...].

    Raises:
        ValueError: the rows do not divide into 2 cp equal chunks.
    """
    if cp.group is None:
        return x
    if x.shape[dim] % (2 * cp.size):
        raise ValueError(f"{x.shape[dim]} row tokens must be a multiple of 2 * cp = {2 * cp.size}")
    chunks = x.chunk(2 * cp.size, dim)
    return torch.cat([chunks[c] for c in owned_chunks(cp.rank, cp)], dim)


class ZigzagLocator:
    """Documents of the tokens that this rank holds, numbered in their row; replaces `Transformer.locate`."""

    def __init__(self, cp: Axis) -> None:
        self.cp = cp

    def __call__(self, offsets: Tensor, tokens: int) -> Documents:
        """Offsets of the full rows, [rows, max_documents + 1], and tokens = row length / cp."""
        documents = locate_documents(offsets, tokens * self.cp.size)
        return Documents(offsets, zigzag(documents.ids, self.cp), zigzag(documents.positions, self.cp))


class PrefixStateCore(LightningCore):
    """Linear attention of tokens spread over cp; takes over the heads and slopes of a local core.

    forward and backward: one exchange each of [2, rows, heads/tp, head_dim, head_dim] fp32 states, whatever
    the row length. The filler, and in backward its gradient, run while an all-gather is in flight.
    """

    def __init__(
        self, core: LightningCore, cp: Axis, *, exchange: StateExchange = StateExchange.allgather
    ) -> None:
        nn.Module.__init__(self)
        self.slope_values = core.slope_values
        self.register_buffer("slopes", core.slopes, persistent=False)
        self.cp, self.exchange = cp, exchange
        self.memo: Memo | None = None
        """As in RingCore."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, *, filler: Callable[[], Any]
    ) -> tuple[Tensor, Any]:
        """q, k, v [rows, tokens/cp, heads/tp, head_dim] -> (o alike, result of filler)."""
        if self.cp.group is None:
            return super().forward(q, k, v, documents, filler=filler)
        q, k, v, ids, positions = (by_chunk(x) for x in (q, k, v, documents.ids, documents.positions))
        local = Documents(documents.offsets, ids, positions)
        ends = lightning_end_state(k, v, self.slopes, local).unflatten(0, (-1, 2)).transpose(0, 1)
        passing = _Passing(self.cp, self.exchange, documents.offsets, self.slopes.to(ends.dtype), k.shape[1])
        passing.memo = self.memo or Memo()
        posted = post(passing, ends)
        filled = filler()
        (entering,) = wait(passing, posted)
        entering = entering.transpose(0, 1).flatten(0, 1)
        o = lightning_attention(q, k, v, self.slopes, local, initial_state=entering)
        return from_chunks(o), filled


class _Passing:
    """The exchanges of one call: x(c+1) = own(c) + through(c) x(c) along the chunks, or from the last back.

    forward: own = end states, x = states before each chunk; these enter if the chunk's first document `began`
    earlier. backward: own = gradients of what entered, x = gradients of the end states.
    """

    def __init__(
        self, cp: Axis, exchange: StateExchange, offsets: Tensor, slopes: Tensor, length: int
    ) -> None:
        self.cp, self.exchange = cp, exchange
        edges = torch.arange(2 * cp.size, device=offsets.device)[:, None, None] * length
        self.began = (offsets != edges).all(-1)[..., None, None, None]  # [chunks, rows, 1, 1, 1]
        is_one = ((offsets <= edges) | (offsets >= edges + length)).all(-1)[..., None, None, None]
        decay = torch.exp(-slopes * length)[:, None, None]
        self.memo = Memo()
        self.through = (self.began & is_one) * decay  # [chunks, rows, heads/tp, 1, 1]

    def send(self, tensors: Sequence[Tensor], *, backward: bool) -> None:
        """Give this rank's [2, rows, heads/tp, head_dim, head_dim] to those who need it."""
        if backward:
            self._start(torch.where(self.mine(self.began), tensors[0], 0))
        elif "entering" not in self.memo:
            self._start(tensors[0])

    def receive(self, *, backward: bool) -> tuple[Tensor, ...]:
        """x of this rank's two chunks, alike; forward: 0 where a document begins."""
        if backward:
            return (self._finish(backward),)
        return (self.memo.once("entering", self._entering).detach(),)

    def _entering(self) -> Tensor:
        return torch.where(self.mine(self.began), self._finish(False), 0)

    def mine(self, chunks: Tensor) -> Tensor:
        """[chunks, ...] -> [2, ...] of this rank."""
        return torch.stack([chunks[chunk] for chunk in owned_chunks(self.cp.rank, self.cp)])

    def _start(self, own: Tensor) -> None:
        self.own = own.contiguous()
        if self.exchange is StateExchange.allgather:
            self.gathered = own.new_empty((self.cp.size * 2, *own.shape[1:]))
            self.work = dist.all_gather_into_tensor(
                self.gathered, self.own, group=self.cp.group, async_op=True
            )

    def _finish(self, backward: bool) -> Tensor:
        if self.exchange is StateExchange.scan:
            found = self._scan(backward)
        else:
            found = self._prefix(backward)
            del self.gathered, self.work  # the graph keeps this object until its backward
        del self.own
        return found

    def _prefix(self, backward: bool) -> Tensor:
        self.work.wait()
        first, second = self.gathered.unflatten(0, (-1, 2)).unbind(1)
        own = torch.cat([first, second.flip(0)])
        order = range(len(own))
        x, found = torch.zeros_like(own[0]), {}
        for chunk in reversed(order) if backward else order:
            found[chunk] = x
            x = own[chunk] + self.through[chunk] * x
        return torch.stack([found[chunk] for chunk in owned_chunks(self.cp.rank, self.cp)])

    def _scan(self, backward: bool) -> Tensor:
        """The same as `_prefix`, from rank to rank: up through the first chunks, down through the second."""
        chunks = owned_chunks(self.cp.rank, self.cp)
        found = torch.zeros_like(self.own)
        x = found[0]
        step = -1 if backward else 1
        for slot in (1, 0) if backward else (0, 1):
            chunk = chunks[slot]
            before, after = self._owner(chunk - step), self._owner(chunk + step)
            if before is not None and before != self.cp.rank:
                x = torch.empty_like(x)
                dist.recv(x, self.cp.ranks[before], self.cp.group)
            found[slot] = x
            x = self.own[slot] + self.through[chunk] * x
            if after is not None and after != self.cp.rank:
                dist.send(x.contiguous(), self.cp.ranks[after], self.cp.group)
        return found

    def _owner(self, chunk: int) -> int | None:
        """The rank of a chunk; None beyond the ends."""
        chunks = 2 * self.cp.size
        return min(chunk, chunks - 1 - chunk) if 0 <= chunk < chunks else None
