"""Optional libraries: used if they pass a trial, passed over with one warning if not.

A library that is installed may lack a file, be built for another GPU, or compute something else than its
version did that was tested here. None of that may end a run in its first step.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

log = logging.getLogger(__name__)

TOLERANCE = 0.03
"""Norm of the difference to the twin over the twin's norm; bf16 rounding makes less than a third of it."""


@cache
def announce(logger: logging.Logger, level: int, message: str) -> None:
    """Log the choice of a backend when it is made for the first time."""
    logger.log(level, "%s", message)


def is_usable(library: str, trial: Callable[[], None], *, tested: str | None = None) -> bool:
    """Tell whether a library is installed and passes a trial; if it is there and does not, warn.

    Args:
        library: name of its distribution.
        trial: imports it and computes something small; raises whatever it likes.
        tested: the only version that is used; None = any.
    """
    try:
        found = version(library)
    except PackageNotFoundError:
        return False
    if tested not in (None, found):
        reason = f"only {tested} is tested"
    else:
        try:
            _in_a_thread(trial)
            return True
        except Exception as error:  # of another project: any kind
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
    log.warning("%s %s is installed but not used: %s", library, found, reason)
    return False


def _in_a_thread(trial: Callable[[], None]) -> None:
    """Run it where neither the caller's gradient mode nor the hooks of recomputation reach."""
    # A new thread begins on GPU 0, not on the caller's.
    device = torch.cuda.current_device() if torch.cuda.is_available() else -1
    with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(device,)) as thread:
        thread.submit(trial).result()


def compare_with_twin(
    fast: Callable[..., Tensor], twin: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> None:
    """Raise an ArithmeticError unless both give the same result and gradients, but for rounding.

    Args:
        inputs: of both, floating point; their gradients are compared.
    """
    found = []
    for function in (fast, twin):
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = function(*leaves)
        found.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    for number, (mine, theirs) in enumerate(zip(*found, strict=True)):
        error = (mine.float() - theirs.float()).norm() / theirs.float().norm()
        if not error <= TOLERANCE:
            what = f"gradient {number}" if number else "result"
            raise ArithmeticError(f"its {what} differs from plain torch's by {error:.1%}")
