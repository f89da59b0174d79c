"""Activation recomputation: backward runs a block's forward pass again instead of keeping its tensors.

`selective` carries over what attention would compute or communicate again: its (o, log-sum-exp) and the
lightning states that enter each chunk. The router's decision is always carried over, and counted once; so is
the plan by which choices travel.
"""

from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.attention import SoftmaxAttention, SoftmaxCore
from model.router import Memo, Router
from model.transformer import Block, Transformer
from parallel.collectives import Axis
from parallel.config import Recompute
from parallel.context import PrefixStateCore
from parallel.expert import AllToAllDispatcher
from parallel.ring import RingCore


def apply_recompute(model: Transformer, cp: Axis, mode: Recompute) -> None:
    """Replace the forward pass of every block, after context parallelism chose the cores."""
    if mode is Recompute.none:
        return
    for block in model.blocks.values():
        assert isinstance(block, Block)
        mixer = block.mixer
        is_local = isinstance(mixer, SoftmaxAttention) and isinstance(mixer.core, SoftmaxCore)
        if mode is Recompute.selective and is_local:
            mixer.core = RingCore(cp)  # on one rank, too: it can take over (o, log-sum-exp)
        block.forward = _Recomputed(block, keeps=mode is Recompute.selective)  # type: ignore[assignment, method-assign]


class _Recomputed:
    """Forward pass of a block that keeps its input and, if `keeps`, what the core hands over."""

    def __init__(self, block: Block, *, keeps: bool) -> None:
        self.inner, dispatcher = block.forward, block.moe.dispatcher
        core = block.mixer.core
        self.users: list[Router | AllToAllDispatcher | RingCore | PrefixStateCore] = [block.moe.router]
        """What asks the memo in both passes."""
        if isinstance(dispatcher, AllToAllDispatcher):
            self.users.append(dispatcher)
        if keeps and isinstance(core, RingCore | PrefixStateCore):
            self.users.append(core)

    def __call__(self, x: Tensor, *arguments: Any) -> Tensor:
        if not x.requires_grad:
            return self.inner(x, *arguments)
        return checkpoint(_Pass(self), x, *arguments, use_reentrant=False, preserve_rng_state=False)


class _Pass:
    """Both passes of one call: the first fills the memo, the second takes from it."""

    def __init__(self, owner: _Recomputed) -> None:
        self.owner, self.memo = owner, Memo()

    def __call__(self, x: Tensor, *arguments: Any) -> Tensor:
        """Run the block with the memo at hand."""
        for user in self.owner.users:
            user.memo = self.memo
        try:
            return self.owner.inner(x, *arguments)
        finally:
            for user in self.owner.users:
                user.memo = None
