"""The GPU form of softmax attention against the twin in fp32; on a CPU the two are one."""

import pytest
import torch

from kernels.documents import locate_documents
from kernels.reference import softmax_attention as twin
from kernels.softmax_attention import softmax_attention

OFFSETS = torch.tensor([[0, 1, 2, 70, 130, 130], [0, 64, 129, 130, 130, 130]], dtype=torch.int32)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (4, 1, 128), (6, 2, 32)])
def test_against_the_twin(heads: int, kv_heads: int, head_dim: int) -> None:
    """Output and gradients; in bf16 at most twice as far from fp32 as the twin itself in bf16."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    documents = locate_documents(OFFSETS.to(device), 130)
    shapes = [(2, 130, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, grad = (torch.randn(shape, generator=generator, device=device) for shape in shapes)

    def results(function, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        o = function(*inputs, documents)
        assert o.dtype == dtype
        return [o, *torch.autograd.grad(o, inputs, grad.to(dtype))]

    exact = results(twin, torch.float32)
    for mine, theirs in zip(results(softmax_attention, torch.float32), exact, strict=True):
        assert torch.equal(mine, theirs)
    rounded = results(twin, torch.bfloat16)
    for mine, plain, truth in zip(results(softmax_attention, torch.bfloat16), rounded, exact, strict=True):
        assert (mine.float() - truth).abs().max() <= 2 * (plain.float() - truth).abs().max()
