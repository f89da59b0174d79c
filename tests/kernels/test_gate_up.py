"""The experts' first half in one pass against its two ops."""

import pytest
import torch
from torch import Tensor

from kernels.gate_up import CONFIGS, Config, gate_up_swiglu, gate_up_swiglu_triton
from kernels.grouped_gemm import grouped_gemm
from kernels.reference import grouped_gemm as grouped_gemm_by_expert
from kernels.reference import swiglu
from tests.kernels.harness import DEVICE, DTYPES, check_against_twin, random_tensor

ON_GPU = DEVICE.type == "cuda"
SMALL = Config(32, 32, 32, 2, 4, 2)
CASES = [
    # rows of each expert, hidden, ffn
    ([1], 8, 8),
    ([0, 33, 0, 64, 3, 0], 40, 48),
    ([0, 0, 70], 64, 32),
]
if ON_GPU:
    CASES += [([0, 1, 500, 63, 1000, 0], 2048, 1408), ([257, 128, 0], 6144, 9216)]


def twin(x: Tensor, weight: Tensor, scale: Tensor, ends: Tensor) -> Tensor:
    return swiglu(grouped_gemm_by_expert(x, weight.flatten(1, 2), ends).unflatten(-1, (2, -1)), scale)


def draw(counts: list[int], hidden: int, ffn: int) -> list[Tensor]:
    """fp64 x and weight, fp32 scale, int32 ends."""
    rows, experts = sum(counts), len(counts)
    ends = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    return [
        random_tensor(rows, hidden, seed=1),
        random_tensor(experts, 2, ffn, hidden, seed=2, scale=hidden**-0.5),
        random_tensor(rows, seed=3).float(),
        ends,
    ]


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32 or not ON_GPU])
@pytest.mark.parametrize("config", CONFIGS if ON_GPU else [SMALL])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[0])))
def test_one_pass_computes_what_two_ops_do(
    case: tuple[list[int], int, int], config: Config, dtype: torch.dtype
) -> None:
    check_against_twin(
        lambda *inputs: gate_up_swiglu_triton(*inputs, config=config), twin, draw(*case), dtype=dtype
    )


def test_no_rows() -> None:
    x, weight, scale, ends = draw([0, 0], 8, 8)
    weight = weight.half().requires_grad_()
    h = gate_up_swiglu_triton(x.half(), weight, scale, ends, SMALL)
    assert h.shape == (0, 8)
    assert not torch.autograd.grad(h.sum(), weight)[0].any()


def test_public_op_is_the_two_ops_without_a_gpu() -> None:
    x, weight, scale, ends = (t.float() if t.is_floating_point() else t for t in draw([3, 0, 5], 12, 8))
    torch.testing.assert_close(gate_up_swiglu(x, weight, scale, ends), twin(x, weight, scale, ends))


def test_split_backward_computes_each_product_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of the engine for the inputs' gradients computes no weight gradient, and the other way round."""
    calls: list[tuple[int, ...]] = []

    def count(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        calls.append(tuple(a.shape))
        return original(a, b, offs=offs)

    original = torch.nn.functional.grouped_mm
    monkeypatch.setattr("torch.nn.functional.grouped_mm", count)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    x, weight, scale, ends = (
        t.to(dtype).requires_grad_() if t.dtype == torch.float64 else t for t in draw([3, 0, 4], 16, 8)
    )
    h = gate_up_swiglu_triton(x, weight, scale, ends, SMALL)
    for wanted, expected in (([x], [(7, 16)]), ([weight], [(16, 7)]), ([x, weight], [(7, 16), (16, 7)])):
        calls.clear()
        torch.autograd.grad(h.sum(), wanted, retain_graph=True)
        assert calls == expected


def test_shapes_that_do_not_fit_are_named() -> None:
    x, weight, scale, ends = draw([3, 5], 12, 8)
    with pytest.raises(ValueError, match=r"x \(8, 11\), weight"):
        gate_up_swiglu(x[:, 1:], weight, scale, ends)
    with pytest.raises(ValueError, match="1 groups"):
        grouped_gemm(x, weight[:, 0], ends[:1])
