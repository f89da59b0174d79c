"""Which tensors the Triton kernels take; all others are their plain-torch twins'."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Operation = TypeVar("Operation", bound=Callable[..., Any])


def has_kernel(x: Tensor) -> bool:
    """Whether the kernels take x."""
    return x.is_cuda and x.dtype != torch.float64


def by_device(kernel: Callable[..., Any], twin: Operation) -> Operation:
    """Make the operation that runs the kernel where its first tensor lies on a GPU, and else its twin.

    The twin says what the operation does, its shapes and its arguments; the kernel takes at least these.
    """

    @wraps(twin)
    def operation(*arguments: Any, **named: Any) -> Any:
        first = next(each for each in arguments if isinstance(each, Tensor))
        return (kernel if has_kernel(first) else twin)(*arguments, **named)

    return cast("Operation", operation)
