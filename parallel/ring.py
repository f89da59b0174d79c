"""Softmax attention over a row that is spread over ranks in zigzag chunks (parallelism.md sec. 4.1).

Rank r owns chunks r and 2 cp - 1 - r of each row. At most one document reaches from a chunk into a later one:
its queries at the head of the later see all its keys at the tail of the earlier. Only these keys travel.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.documents import Documents
from kernels.reference import merge_attention, widen
from kernels.softmax_attention import attend, attend_backward, softmax_attention
from model.router import Memo
from parallel.collectives import Axis


def owned_chunks(rank: int, cp: Axis) -> tuple[int, int]:
    """The chunks of a rank in the order in which it holds them."""
    return rank, 2 * cp.size - 1 - rank


def by_chunk(x: Tensor) -> Tensor:
    """Make every chunk a row of its own: [rows, tokens/cp, ...] -> [rows * 2, tokens/(2 cp), ...]."""
    if x.shape[1] % 2:
        raise ValueError(f"tokens / cp = {x.shape[1]} must be even: a rank holds two chunks of each row")
    return x.unflatten(1, (2, -1)).flatten(0, 1)


def from_chunks(x: Tensor) -> Tensor:
    """Undo `by_chunk`."""
    return x.unflatten(0, (-1, 2)).flatten(1, 2)


class Crossing(NamedTuple):
    """A document that covers the end of a chunk and goes on in the next one."""

    row: int
    chunk: int
    start: int
    """First of its tokens, counted from the chunk's start: later chunks see the keys from here to the end."""
    stop: int
    """Where it ends, counted from the row's start."""


def find_crossings(offsets: list[list[int]], length: int, chunks: int) -> list[Crossing]:
    """By row and chunk; every rank finds the same from the rows' offsets.

    Args:
        offsets: as in `Documents`.
        length: tokens a chunk.
    """
    found = []
    for row, starts in enumerate(offsets):
        bounds = [*starts, length * chunks]
        for chunk in range(chunks - 1):
            number = bisect_right(bounds, (chunk + 1) * length - 1)
            if bounds[number] > (chunk + 1) * length:
                start = max(bounds[number - 1] - chunk * length, 0)
                found.append(Crossing(row, chunk, start, bounds[number]))
    return found


def documents_of_chunks(documents: Documents, offsets: list[list[int]], chunks: tuple[int, int]) -> Documents:
    """The parts of documents in each chunk of a rank, every chunk a row of its own.

    Args:
        documents: of the rank's tokens, its offsets those of the whole row.
        offsets: the same, on the host.
        chunks: the rank's, in the order in which it holds them.
    """
    ids, positions = by_chunk(documents.ids), by_chunk(documents.positions)
    length = ids.shape[1]
    inside = [(documents.offsets - chunk * length).clamp(0, length) for chunk in chunks]
    on_host = [
        [min(max(start - chunk * length, 0), length) for start in row] for row in offsets for chunk in chunks
    ]
    return Documents(torch.stack(inside, 1).flatten(0, 1), ids, positions, on_host)


class RingCore(nn.Module):
    """Attention of tokens spread over cp; every rank gets the keys and values that its documents reach.

    forward: cp - 1 steps; at step s keys and values go to rank + s and come from rank - s. backward: the same
    again, and their gradients go back in fp32. The transfer of step s + 1 is posted before the compute of s.
    """

    def __init__(self, cp: Axis) -> None:
        super().__init__()
        self.cp = cp
        self.sent_bytes = 0
        """By this rank, forward and backward."""
        self.memo: Memo | None = None
        """Set by recompute.py while a block runs that will be computed again."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, *, filler: Callable[[], Any]
    ) -> tuple[Tensor, Any]:
        """q [rows, tokens/cp, heads, head_dim], k and v with kv_heads -> (o like q, result of filler).

        Without `documents.on_host` it reads the offsets from the device: one synchronisation a call.
        """
        if self.cp.group is None:
            if self.memo is None:
                return softmax_attention(q, k, v, documents), filler()
            return _KeptAttention.apply(q, k, v, documents, self.memo), filler()
        offsets = documents.on_host or documents.offsets.tolist()
        local = documents_of_chunks(documents, offsets, owned_chunks(self.cp.rank, self.cp))
        ring = _Ring(self, offsets, q.shape[1] // 2)
        return _RingAttention.apply(q, k, v, local, ring, self.memo), filler()


class _Ring:
    """What this rank sends and receives in one call of the core, and where it lies."""

    def __init__(self, core: RingCore, offsets: list[list[int]], length: int) -> None:
        self.core, self.cp, self.length = core, core.cp, length
        self.crossings = find_crossings(offsets, length, 2 * self.cp.size)

    def sum_of(self, x: Tensor) -> Tensor:
        """x as the first term of a sum, at least fp32; x itself where no document crosses a chunk's end."""
        return widen(x) if self.crossings else x

    def crossings_between(self, source: int, target: int) -> list[Crossing]:
        """Of the source's chunks into the target's, in the order in which they travel."""
        return [
            x for x in self.crossings if x.chunk in owned_chunks(source, self.cp) and self.queries(x, target)
        ]

    def queries(self, crossing: Crossing, rank: int) -> list[slice]:
        """Local places of a rank's tokens that see the crossing's keys."""
        found = []
        for slot, chunk in enumerate(owned_chunks(rank, self.cp)):
            reached = min(crossing.stop - chunk * self.length, self.length)
            if chunk > crossing.chunk and reached > 0:
                found.append(slice(slot * self.length, slot * self.length + reached))
        return found

    def keys(self, crossing: Crossing) -> slice:
        """Local places of the crossing's keys on the rank that owns them."""
        slot = int(crossing.chunk >= self.cp.size)
        return slice(slot * self.length + crossing.start, (slot + 1) * self.length)

    def neighbours(self, step: int) -> tuple[int, int]:
        """The ranks that get this one's keys at a step, and whose keys this one gets."""
        return (self.cp.rank + step) % self.cp.size, (self.cp.rank - step) % self.cp.size

    def arrivals(self, k: Tensor, v: Tensor) -> Iterator[tuple[int, list[Crossing], list[Tensor]]]:
        """At each step the crossings and the [keys, 2, kv_heads, head_dim] k and v of each."""
        held = self._pack(k, v, self.cp.rank)
        for step in range(self.cp.size):
            if step + 1 < self.cp.size:
                target, source = self.neighbours(step + 1)
                packed = self._pack(k, v, target)
                coming = _Transfer(self, packed, target, self._room(held, source, self.cp.rank), source)
            crossings = self.crossings_between(self.neighbours(step)[1], self.cp.rank)
            yield step, crossings, list(held.split(self._sizes(crossings)))
            if step + 1 < self.cp.size:
                held = coming.wait()

    def send_back(self, step: int, grads: list[Tensor], like: Tensor) -> Callable[[], list[Tensor]]:
        """Return gradients of keys to their owner; the result waits for those of the keys sent then."""
        target, source = self.neighbours(step)
        packed = torch.cat([like[:0], *grads])
        transfer = _Transfer(self, packed, source, self._room(like, self.cp.rank, target), target)
        sizes = self._sizes(self.crossings_between(self.cp.rank, target))
        return lambda: list(transfer.wait().split(sizes))

    def _pack(self, k: Tensor, v: Tensor, target: int) -> Tensor:
        """[keys, 2, kv_heads, head_dim] of all crossings from this rank to the target."""
        crossings = self.crossings_between(self.cp.rank, target)
        parts = [torch.stack([x[c.row, self.keys(c)] for x in (k, v)], dim=1) for c in crossings]
        return torch.cat([k.new_empty((0, 2, *k.shape[2:])), *parts])

    def _room(self, like: Tensor, source: int, target: int) -> Tensor:
        return like.new_empty((sum(self._sizes(self.crossings_between(source, target))), *like.shape[1:]))

    def _sizes(self, crossings: list[Crossing]) -> list[int]:
        return [self.length - crossing.start for crossing in crossings]


class _Transfer:
    """A send and a receive under way; what is empty is not sent, as both ends know."""

    def __init__(self, ring: _Ring, leaving: Tensor, target: int, arriving: Tensor, source: int) -> None:
        ends = ((dist.isend, leaving, target), (dist.irecv, arriving, source))
        cp = ring.cp
        ops = [dist.P2POp(op, x, cp.ranks[peer], cp.group) for op, x, peer in ends if x.numel()]
        self.leaving, self.arriving = leaving, arriving  # buffers live as long as the transfer
        self.works = dist.batch_isend_irecv(ops) if ops else []
        ring.core.sent_bytes += leaving.nbytes

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.arriving


class _KeptAttention(torch.autograd.Function):
    """forward: attention of one rank, saves (o, log-sum-exp), which a recomputation takes over; backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents, memo: Memo) -> Tensor:
        o, lse = memo.once("attention", lambda: attend(q, k, v, documents=documents))
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.documents = documents
        return o.to(q.dtype).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        found = attend_backward(grads[0], q, k, v, *kept, documents=ctx.documents)
        return *(x.to(like.dtype) for x, like in zip(found, (q, k, v), strict=True)), None, None


class _RingAttention(torch.autograd.Function):
    """forward: the ring, saves (o, log-sum-exp); backward: the ring again, gradients of keys sent back."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, local: Documents, ring: _Ring, memo: Memo | None
    ) -> Tensor:
        o, lse = (memo or Memo()).once("attention", lambda: _ring_forward(q, k, v, local, ring))
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.local, ctx.ring = local, ring
        return o.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        ring, grad = ctx.ring, grads[0]
        returning: Callable[[], list[Tensor]] = list
        for step, crossings, held in ring.arrivals(k, v):
            if step == 0:
                chunks = [by_chunk(x) for x in (grad, q, k, v, o, lse)]
                found = attend_backward(*chunks, documents=ctx.local)
                dq, dk, dv = (ring.sum_of(from_chunks(x)) for x in found)
                dkv = torch.stack([dk, dv], dim=2)
            key_grads = []
            for crossing, keys in zip(crossings, held, strict=True):
                key_grads.append(torch.zeros_like(keys, dtype=dkv.dtype))
                for queries in ring.queries(crossing, ring.cp.rank):
                    at = slice(crossing.row, crossing.row + 1), queries
                    key, value = keys[None].unbind(2)
                    part = attend_backward(grad[at], q[at], key, value, o[at], lse[at])
                    dq[at] += part[0]
                    key_grads[-1] += torch.stack(part[1:], dim=2)[0]
            if step == 0:
                _add_returned(dkv, ring, step, key_grads)
                continue
            if step > 1:  # one step's gradients are under way while the next one computes
                _add_returned(dkv, ring, step - 1, returning())
            returning = ring.send_back(step, key_grads, dkv[0])
        if ring.cp.size > 1:
            _add_returned(dkv, ring, ring.cp.size - 1, returning())
        dk, dv = dkv.unbind(2)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _ring_forward(q: Tensor, k: Tensor, v: Tensor, local: Documents, ring: _Ring) -> tuple[Tensor, Tensor]:
    """(o [rows, tokens/cp, heads, head_dim] in q's dtype, log-sum-exp [rows, tokens/cp, heads])."""
    for step, crossings, held in ring.arrivals(k, v):
        if step == 0:  # after the first transfer is posted
            o, lse = (from_chunks(x) for x in attend(*(by_chunk(x) for x in (q, k, v)), documents=local))
            o = ring.sum_of(o)
        for crossing, keys in zip(crossings, held, strict=True):
            for queries in ring.queries(crossing, ring.cp.rank):
                at = slice(crossing.row, crossing.row + 1), queries
                key, value = keys[None].unbind(2)
                o[at], lse[at] = merge_attention(o[at], lse[at], *attend(q[at], key, value))
    return o.to(q.dtype), lse


def _add_returned(dkv: Tensor, ring: _Ring, step: int, returned: list[Tensor]) -> None:
    crossings = ring.crossings_between(ring.cp.rank, ring.neighbours(step)[0])
    for crossing, part in zip(crossings, returned, strict=True):
        dkv[crossing.row, ring.keys(crossing)] += part
