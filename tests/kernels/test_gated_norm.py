"""The gated norm's kernels against plain torch, whole rows and parts of them."""

from functools import partial

import pytest
import torch
from torch import Tensor

from kernels.gated_norm import (
    gated_rms_norm,
    gated_rms_norm_triton,
)
from kernels.reference import gated_rms_norm as plain_gated_rms_norm
from kernels.row_tiles import BACKWARD, FORWARD, Config
from tests.support.kernel_checks import DEVICE, DTYPES, check_against_twin, random_tensor

ON_GPU = DEVICE.type == "cuda"
SHAPES = [(0, 96), (63, 1), (1, 5), (2, 3, 96), (7, 2048), (2, 6144)]
if ON_GPU:
    SHAPES += [(1000, 6144), (1000, 8192), (4097, 2048), (1, 20000)]
CONFIGS = [Config(forward, backward) for forward in FORWARD for backward in BACKWARD]
mine, plain = partial(gated_rms_norm_triton, eps=1e-6), partial(plain_gated_rms_norm, eps=1e-6)


def inputs(*shape: int) -> list[Tensor]:
    """o, gate, weight."""
    return [
        *(random_tensor(*shape, seed=seed, scale=2.0) for seed in (0, 1)),
        random_tensor(shape[-1], seed=2),
    ]


def same_again(total: Tensor) -> Tensor:
    """`merge` of rows that are the same part several times."""
    return 3 * total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_whole_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_against_twin(mine, plain, inputs(*shape), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 5), (9, 96), (3, 2048)])
def test_parts_of_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    options = {"parts": 3, "merge": same_again}
    check_against_twin(partial(mine, **options), partial(plain, **options), inputs(*shape), dtype=dtype)


def test_the_same_part_twice_is_the_whole_row() -> None:
    o, gate, weight = (x.float() for x in inputs(11, 40))
    whole = mine(torch.cat([o, o], -1), torch.cat([gate, gate], -1), torch.cat([weight, weight]))
    part = mine(o, gate, weight, parts=2, merge=lambda total: 2 * total)
    torch.testing.assert_close(part, whole[:, :40])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("size", [24, 2500])
@pytest.mark.parametrize("options", [{}, {"parts": 3, "merge": same_again}], ids=["whole", "part"])
def test_every_config(config: Config, size: int, options: dict) -> None:
    dtype = torch.bfloat16 if ON_GPU else torch.float16
    kernel = partial(mine, config=config, **options)
    check_against_twin(kernel, partial(plain, **options), inputs(1000 if ON_GPU else 13, size), dtype=dtype)


def test_strided_rows() -> None:
    """Heads of a wider tensor, one gate for all, and gradients that are parts of wider rows."""
    wide = random_tensor(2, 6, 4, 15, seed=3, dtype=torch.float32)
    gate = random_tensor(20, seed=4, dtype=torch.float32).expand(2, 6, 20)
    weight = random_tensor(20, seed=5, dtype=torch.float32).requires_grad_()
    o, gate = wide[..., 5:10].flatten(-2).detach().requires_grad_(), gate.detach().requires_grad_()
    for upstream in (wide.flatten(-2)[..., 30:50], wide[:, :1, 0, :1].expand(2, 6, 20)):
        ours = torch.autograd.grad(mine(o, gate, weight), (o, gate, weight), upstream)
        theirs = torch.autograd.grad(plain(o, gate, weight), (o, gate, weight), upstream)
        torch.testing.assert_close(ours, theirs)


def test_gates_of_any_size() -> None:
    """A closed and an open gate, as far as fp32 goes."""
    o, _, weight = (x.float() for x in inputs(2, 30))
    gate = torch.tensor([[-200.0], [200.0]], device=DEVICE).expand(2, 30)
    y = mine(o, gate, weight)
    assert not y[0].any()
    torch.testing.assert_close(y, plain(o, gate, weight))


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"gate \(2, 3\)"):
        mine(torch.zeros(2, 4), torch.zeros(2, 3), torch.zeros(4))


def test_public_function_chooses_by_device() -> None:
    tensors = [x.half() for x in inputs(9, 40)]
    assert torch.equal(gated_rms_norm(*tensors, 1e-6), (mine if ON_GPU else plain)(*tensors))
