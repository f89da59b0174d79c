"""The twins against formulas written another way, with packed documents and sizes that divide nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.documents import Documents, locate_documents
from kernels.reference import (
    apply_rotary,
    attention_part,
    attention_part_backward,
    grouped_gemm,
    lightning_attention,
    lightning_end_state,
    linear_cross_entropy,
    merge_attention,
    rms_norm,
    rotary_table,
    softmax_attention,
    swiglu,
)

DOCUMENTS = {
    "one": [[0, 100, 100, 100, 100]],
    "many": [[0, 1, 2, 63, 100], [0, 64, 65, 99, 100]],
    "chunk edges": [[0, 16, 32, 100, 100], [0, 15, 17, 64, 100], [0, 100, 100, 100, 100]],
}


def documents_of(name: str) -> Documents:
    return locate_documents(torch.tensor(DOCUMENTS[name], dtype=torch.int32), 100)


def inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def compare(actual: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """Values and the gradient of every leaf, in fp64."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(actual, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_documents_number_tokens() -> None:
    documents = locate_documents(torch.tensor([[0, 1, 4, 6, 6], [0, 6, 6, 6, 6]], dtype=torch.int32), 6)
    assert documents.ids.tolist() == [[0, 1, 1, 1, 2, 2], [0] * 6]
    assert documents.positions.tolist() == [[0, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("chunk", [16, 33, 128])
def test_lightning_is_the_recurrence(name: str, chunk: int) -> None:
    documents = documents_of(name)
    rows = documents.ids.shape[0]
    q, k, v = leaves = inputs(*[(rows, 100, 3, 5)] * 3)
    slopes = torch.tensor([0.9, 0.1, 0.004], dtype=torch.float64)
    state = torch.zeros(rows, 3, 5, 5, dtype=torch.float64)
    outputs = []
    for t in range(100):
        keep = (documents.positions[:, t] > 0).double()[:, None, None, None]
        state = keep * torch.exp(-slopes)[:, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((q[:, t, :, None] @ state)[:, :, 0])
    compare(lightning_attention(q, k, v, slopes, documents, chunk=chunk), torch.stack(outputs, dim=1), leaves)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_softmax_attention_by_document(name: str) -> None:
    documents = documents_of(name)
    rows = documents.ids.shape[0]
    q, k, v = leaves = inputs((rows, 100, 6, 4), (rows, 100, 2, 4), (rows, 100, 2, 4))
    scores = torch.einsum("rihd,rjhd->rhij", q, k.repeat_interleave(3, 2)) / 2
    i = torch.arange(100)
    same = documents.ids[:, :, None] == documents.ids[:, None]
    scores = scores.masked_fill(~(same & (i[:, None] >= i))[:, None], -torch.inf)
    expected = torch.einsum("rhij,rjhd->rihd", scores.softmax(-1), v.repeat_interleave(3, 2))
    compare(softmax_attention(q, k, v, documents), expected, leaves)


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("cut", [33, 64])
def test_lightning_goes_on_from_a_state(name: str, cut: int) -> None:
    documents = documents_of(name)
    q, k, v = leaves = inputs(*[(documents.ids.shape[0], 100, 3, 5)] * 3)
    slopes = torch.tensor([0.9, 0.1, 0.004], dtype=torch.float64)
    (q0, q1), (k0, k1), (v0, v1), (ids0, ids1), (at0, at1) = (
        x.split([cut, 100 - cut], dim=1) for x in (q, k, v, documents.ids, documents.positions)
    )
    before, after = Documents(documents.offsets, ids0, at0), Documents(documents.offsets, ids1, at1)
    state = lightning_end_state(k0, v0, slopes, before) * (at1[:, 0] > 0)[:, None, None, None]
    parts = [
        lightning_attention(q0, k0, v0, slopes, before, chunk=16),
        lightning_attention(q1, k1, v1, slopes, after, chunk=16, initial_state=state),
    ]
    compare(torch.cat(parts, dim=1), lightning_attention(q, k, v, slopes, documents), leaves)


def test_attention_parts_add_up() -> None:
    """Any split of the keys, of which one part is masked, against attention over all of them."""
    q, k, v = leaves = inputs((2, 7, 6, 4), (2, 9, 2, 4), (2, 9, 2, 4))
    seen = torch.rand(2, 7, 5) < 0.5
    seen[:, :, 2] = True
    mask = torch.cat([seen, torch.ones(2, 7, 4, dtype=torch.bool)], dim=2)[:, None]
    whole = [x.transpose(1, 2) for x in (q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2))]
    expected = F.scaled_dot_product_attention(*whole, attn_mask=mask).transpose(1, 2)
    first, second = (k[:, :5], v[:, :5]), (k[:, 5:], v[:, 5:])
    o, lse = merge_attention(*attention_part(q, *first, seen), *attention_part(q, *second))
    grad = torch.randn_like(o)
    expected_grads = torch.autograd.grad(expected, leaves, grad, retain_graph=True)
    compare(o, expected, leaves)
    with torch.no_grad():
        shared = (lse, (o * grad).sum(-1), grad)
        dq0, dk0, dv0 = attention_part_backward(q, *first, *shared, seen)
        dq1, dk1, dv1 = attention_part_backward(q, *second, *shared)
    actual = (dq0 + dq1, torch.cat([dk0, dk1], 1), torch.cat([dv0, dv1], 1))
    for mine, theirs in zip(actual, expected_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rotary_dim", [2, 6, 10])
def test_partial_rotary_is_a_rotation_of_pairs(rotary_dim: int) -> None:
    """Entries i of both halves turn by position * theta^(-2i/rotary_dim); the rest stays."""
    (x,) = leaves = inputs((2, 7, 3, 10))
    positions = torch.arange(14).view(2, 7) * 3
    half = rotary_dim // 2
    table = rotary_table(positions, rotary_dim, 100.0)
    turned = torch.view_as_complex(torch.stack([x[..., :half], x[..., half:rotary_dim]], dim=-1))
    frequency = torch.tensor([100.0 ** (-2 * i / rotary_dim) for i in range(half)])
    angle = (positions[..., None, None] * frequency).double()
    turned = turned * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag, x[..., rotary_dim:]], dim=-1)
    torch.testing.assert_close(apply_rotary(x, table), expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(apply_rotary(x, table).square().sum(), leaves)
    torch.testing.assert_close(gradient, 2 * x, rtol=1e-5, atol=1e-5)  # a rotation keeps the norm


def test_rms_norm_rounds_before_the_weight() -> None:
    x, weight = torch.randn(3, 65).bfloat16(), torch.randn(65).bfloat16()
    wide = x.float()
    expected = (wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()).bfloat16() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected, rtol=0.01, atol=0)
    leaf, scale = inputs((4, 9), (9,))
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-6), (leaf, scale))


def test_swiglu_scales_each_token() -> None:
    gate_up, scale = inputs((7, 2, 5), (7,))
    expected = F.silu(gate_up[:, 0]) * gate_up[:, 1] * scale[:, None]
    compare(swiglu(gate_up, scale), expected, [gate_up, scale])


def test_grouped_gemm_is_one_product_an_expert() -> None:
    x, weight = leaves = inputs((9, 3), (4, 5, 3))
    ends = torch.tensor([2, 2, 9, 9], dtype=torch.int32)
    expected = torch.cat([x[:2] @ weight[0].T, x[2:] @ weight[2].T])
    torch.testing.assert_close(grouped_gemm(x, weight, ends), expected)
    (gradient,) = torch.autograd.grad(grouped_gemm(x, weight, ends).sum(), leaves[1:])
    assert not gradient[1].any()
    assert not gradient[3].any()
    assert gradient[2].any()


def test_linear_cross_entropy_ignores_negative_targets() -> None:
    hidden, weight = inputs((6, 4), (11, 4))
    targets = torch.tensor([0, 10, -100, 3, -1, 7])
    losses = linear_cross_entropy(hidden, weight, targets)
    assert losses[2] == losses[4] == 0
    kept = targets >= 0
    expected = F.cross_entropy((hidden @ weight.T)[kept], targets[kept], reduction="none")
    torch.testing.assert_close(losses[kept], expected)
