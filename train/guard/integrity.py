"""Silent corruption: bits of weights and moments that change while nobody writes them, replicas that part.

Invariant: what is hashed after an update has the same hash before the next one, and the same on every tp rank
that holds the same part; until the ranks have agreed on that, nothing is updated or saved.
"""

import logging
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from parallel.collectives import all_gather, all_gather_values, all_reduce_sum
from parallel.mesh import Mesh
from parallel.optimizer import AdamW
from parallel.placement import Shard

log = logging.getLogger(__name__)

WORDS = 1 << 20
"""64-bit words that are hashed at once: 8 MiB of factors, and as much again for their products."""
STRIDE = -0x61C8864680B583EB
"""2^64 by the golden ratio, odd."""
NAMED = 5  # things that a message spells out


class DamagedStateError(RuntimeError):
    """Weights or moments changed at rest; raised on all ranks, with what each of them found."""


def digests(tensors: Iterable[Tensor]) -> Tensor:
    """Hash each tensor's bits, [tensors] int64 on the last one's device; reads nothing to the host.

    The sum of all 64-bit words, each times an odd number that depends on its place: arithmetic modulo 2^64 is
    exact in any order, and odd numbers have an inverse, so whatever changes in one word changes the hash.

    Args:
        tensors: of elements of 4 or 8 bytes.
    """
    tensors = list(tensors)
    needed = min(WORDS, max(tensor.nbytes for tensor in tensors) // 8)
    factors = {device: _odd_numbers(needed, device) for device in {tensor.device for tensor in tensors}}
    found = [_digest(tensor.detach().flatten(), factors[tensor.device]) for tensor in tensors]
    return torch.stack([digest.to(found[-1].device) for digest in found])


def _odd_numbers(count: int, device: torch.device) -> Tensor:
    """[count] int64 that look random, by splitmix64."""
    x = torch.arange(1, count + 1, device=device) * STRIDE
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ (x >> shift)) * factor
    return x | 1


def _digest(x: Tensor, factors: Tensor) -> Tensor:
    """Hash the elements of x, [n]; blocks of words follow each other as the digits of a number."""
    per_word = 8 // x.element_size()
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for part in x.split(per_word * WORDS):
        if part.storage_offset() % per_word:
            part = part.clone()  # a view as words must begin with one
        whole = part.numel() // per_word * per_word
        words = part[:whole].view(torch.int64)
        total = total * STRIDE + (words * factors[: len(words)]).sum()
        if whole < part.numel():
            total = total * STRIDE + part[whole:].view(torch.int32).sum()
    return total


class StateGuard:
    """Remembers the hashes of this rank's masters, moments and router biases from one update to the next."""

    def __init__(
        self, shards: Sequence[Shard], optimizer: AdamW, biases: Mapping[str, Tensor],
        mesh: Mesh, *, every: int | None,
    ) -> None:  # fmt: skip
        """Hash every so many steps; None = never."""
        self.shards, self.optimizer, self.biases = shards, optimizer, biases
        self.mesh, self.every = mesh, every
        self.names = list(self._state())
        by_name = {shard.name: shard.share for shard in shards}
        shares = [by_name.get(name.partition(".")[2], mesh.tp.size) for name in self.names]
        groups = torch.tensor([[rank // share for share in shares] for rank in range(mesh.tp.size)])
        self.is_replica = (groups == groups[mesh.tp.rank]).to(mesh.device)
        """[tp, tensors]: whether that rank holds the same part of the tensor as this one."""
        self.kept: tuple[int, Tensor] | None = None
        """Updates made so far, and [tp, tensors]: the hashes of all tp ranks since the last of them."""
        self.seen: Tensor | None = None
        """[tensors]: this rank's when it last looked."""

    def _state(self) -> dict[str, Tensor]:
        masters = {f"model.{shard.name}": shard.master for shard in self.shards}
        return masters | self.optimizer.moments(self.shards) | dict(self.biases)

    def _hashes(self) -> Tensor:
        return digests(self._state().values()).to(self.mesh.device)

    def _at_rest(self, updates: int) -> Tensor | None:
        """[tp, tensors]: hashes since the last of so many updates; None if none were taken."""
        return None if self.kept is None or self.kept[0] != updates else self.kept[1]

    def remember(self, updates: int, step: int, *, saves: bool) -> None:
        """Hash the state after a step if it is this one's turn, or if it is about to be saved."""
        if self.every is not None and self._at_rest(updates) is None and (saves or step % self.every == 0):
            self.kept = updates, all_gather(self._hashes()[None], self.mesh.tp)

    def damage(self, updates: int) -> Tensor:
        """Tell whether this rank's state has changed at rest or is not that of its replicas.

        Args:
            updates: made so far; hashes from before the last of them say nothing.

        Returns:
            1 or 0, fp64, on the device.
        """
        kept = self._at_rest(updates)
        if kept is None:
            return torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        mine = kept[self.mesh.tp.rank]
        self.seen = self._hashes()
        apart = (kept != mine) & self.is_replica
        return ((self.seen != mine).any() | apart.any()).double()

    def check(self, updates: int) -> None:
        """Let all ranks look, before a save.

        Raises:
            DamagedStateError: on every rank, if one found something.
        """
        is_known = self._at_rest(updates) is not None
        if is_known and all_reduce_sum(self.damage(updates), self.mesh.world).item():
            self.fail()

    def fail(self) -> NoReturn:
        """Say which ranks and tensors; every rank comes here if one has damage.

        Raises:
            DamagedStateError: always.
        """
        assert self.kept is not None and self.seen is not None
        kept, now = self.kept[1].tolist(), self.seen.tolist()
        mine = kept[self.mesh.tp.rank]
        changed = [name for name, old, new in zip(self.names, mine, now, strict=True) if old != new]
        found = []
        if changed:
            where = f"rank {self.mesh.rank} on {platform.node()}"
            found.append(f"{where}: {some(changed)} changed between two updates")
        found += _parted(self.names, kept, self.is_replica.tolist(), self.mesh.tp.ranks)
        if found:
            log.error("%s", "; ".join(found))
        lines = dict.fromkeys(line for lines in all_gather_values(found, self.mesh.world) for line in lines)
        raise DamagedStateError(
            f"silent corruption of memory: {'; '.join(lines)}. Nothing was saved, the last checkpoint is "
            "from before; look at the memory of that machine before it is used again"
        )


def _parted(
    names: Sequence[str],
    kept: Sequence[Sequence[int]],
    is_replica: Sequence[Sequence[bool]],
    ranks: Sequence[int],
) -> list[str]:
    """Write a line for each set of ranks whose replicas differ, with the odd ones out where most agree.

    `kept` and `is_replica` are [tp][tensors]; `ranks` are those of the job, by tp rank.
    """
    by_verdict: dict[str, list[str]] = {}
    for name, hashes, same in zip(names, zip(*kept, strict=True), zip(*is_replica, strict=True), strict=True):
        group = {rank: value for rank, value, held in zip(ranks, hashes, same, strict=True) if held}
        most, count = Counter(group.values()).most_common(1)[0]
        if count == len(group):
            continue
        odd = [rank for rank, value in group.items() if value != most] if 2 * count > len(group) else []
        verdict = f"tp ranks {list(group)} hold different bits"
        verdict += f", rank{'s' * (len(odd) > 1)} {str(odd)[1:-1]} the odd one out" if odd else ""
        by_verdict.setdefault(verdict, []).append(name)
    return [f"{verdict}: {some(found)}" for verdict, found in by_verdict.items()]


def some(names: Sequence[str], separator: str = ", ") -> str:
    """Join the first few names, and say how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return separator.join(names[:NAMED]) + more
