"""Softmax attention: every backend against the twin, the choice among them, parts and their merge.

On a CPU the twin is the only backend; what surrounds the others is tested there, too.
"""

import logging
import operator
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels.documents import Documents, locate_documents
from kernels.optional import announce
from kernels.reference import merge_attention
from kernels.reference import softmax_attention as twin
from kernels.softmax_attention import (
    CUDNN_TOKENS,
    Backend,
    attend,
    attend_backward,
    choose_backend,
    cut_documents,
    document_spans,
    has_flash4,
    planned_length,
    softmax_attention,
    softmax_attention_flash,
)
from tests.support.kernel_checks import DEVICE, allowed_errors, errors, outputs_and_gradients, random_tensor

ON_GPU = DEVICE.type == "cuda"
FLASH = [Backend.flash2, Backend.cudnn, *([Backend.flash4] if has_flash4() else [])] if ON_GPU else []
BACKENDS = FLASH or [Backend.twin]
EVERYTHING = {
    "capability": (9, 0),
    "has_flash4": True,
    "has_cudnn": True,
    "knows_lengths": True,
    "is_deterministic": False,
}
ROWS = {
    "short": (130, [[0, 1, 2, 70], [0, 64, 129]]),
    "one": (63, [[0], [0]]),
    # Long documents beside short ones; a cut length, at the end of everything, too.
    "long": (CUDNN_TOKENS + 500, [[0, 3, CUDNN_TOKENS + 3, CUDNN_TOKENS + 4], [0, 1, 400, 401]]),
}


def documents_of(tokens: int, starts: list[list[int]]) -> Documents:
    width = max(map(len, starts)) + 1
    on_host = [row + [tokens] * (width - len(row)) for row in starts]
    offsets = torch.tensor(on_host, dtype=torch.int32, device=DEVICE)
    return locate_documents(offsets, tokens)._replace(on_host=on_host)


def draw(rows: int, tokens: int, heads: tuple[int, int], head_dim: int) -> list[Tensor]:
    """q, k, v."""
    sizes = (heads[0], heads[1], heads[1])
    return [random_tensor(rows, tokens, n, head_dim, seed=i) for i, n in enumerate(sizes)]


def compare(found: list[Tensor], op, inputs: list[Tensor], dtype: torch.dtype, seed: int = 1) -> None:
    """At most twice as far from fp64 as the twin in the same dtype."""
    narrow = [x.to(dtype) for x in inputs]
    truth = outputs_and_gradients(op, [x.double() for x in narrow], seed)
    plain = outputs_and_gradients(op, narrow, seed)
    for name, mine, theirs, right in zip(("o", "dq", "dk", "dv"), found, plain, truth, strict=True):
        assert mine.isfinite().all()
        bounds = allowed_errors(errors(theirs, right), dtype)
        assert all(map(operator.le, errors(mine, right), bounds)), name


@pytest.mark.parametrize("name", ROWS if ON_GPU else ["short", "one"])
@pytest.mark.parametrize(("heads", "head_dim"), [((4, 4), 64), ((8, 2), 128), ((3, 1), 24)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16] if ON_GPU else [torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_paths_against_the_twin(
    backend: Backend, dtype: torch.dtype, heads: tuple[int, int], head_dim: int, name: str
) -> None:
    tokens, starts = ROWS[name]
    documents = documents_of(tokens, starts)

    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if backend is Backend.twin:
            return softmax_attention(q, k, v, documents)
        return softmax_attention_flash(q, k, v, documents, backend)

    inputs = draw(len(starts), tokens, heads, head_dim)
    narrow = [x.to(dtype) for x in inputs]
    found = outputs_and_gradients(op, narrow, 1)
    assert all(x.dtype == dtype for x in found)
    compare(found, lambda q, k, v: twin(q, k, v, documents), inputs, dtype)
    if backend is not Backend.cudnn:
        torch.use_deterministic_algorithms(True)
        first, second = (outputs_and_gradients(op, narrow, 1) for _ in range(2))
        assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    "sizes", [(5, 8), *([(CUDNN_TOKENS, CUDNN_TOKENS + 128), (CUDNN_TOKENS, 77)] if ON_GPU else [])]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_the_keys_merge(
    backend: Backend, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row in two halves: later queries see the keys of both, which are computed apart."""
    monkeypatch.setattr("kernels.softmax_attention.backend_for", lambda *_: backend)
    dtype = torch.float64 if backend is Backend.twin else torch.bfloat16
    first, tokens = sizes[0], sum(sizes)
    inputs = draw(1, tokens, (4, 2), 128 if ON_GPU else 6)
    whole = documents_of(tokens, [[0]])
    halves = [documents_of(size, [[0]]) for size in sizes]
    (q0, q1), (k0, k1), (v0, v1) = ((x[:, :first].to(dtype), x[:, first:].to(dtype)) for x in inputs)
    upstream = random_tensor(1, tokens, 4, q0.shape[-1], seed=1, dtype=dtype)
    grad0, grad1 = upstream[:, :first], upstream[:, first:]

    o0, lse0 = attend(q0, k0, v0, documents=halves[0])
    o1, lse1 = merge_attention(*attend(q1, k1, v1, documents=halves[1]), *attend(q1, k0, v0))
    assert lse0.shape == q0.shape[:3]
    assert lse0.dtype in (torch.float32, torch.float64)
    dq0, dk00, dv00 = attend_backward(grad0, q0, k0, v0, o0, lse0, documents=halves[0])
    dq11, dk1, dv1 = attend_backward(grad1, q1, k1, v1, o1, lse1, documents=halves[1])
    dq10, dk10, dv10 = attend_backward(grad1, q1, k0, v0, o1, lse1)
    if backend is not Backend.twin:
        dq11, dk00, dv00 = dq11.float(), dk00.float(), dv00.float()
    pairs = [(o0, o1), (dq0, dq11 + dq10), (dk00 + dk10, dk1), (dv00 + dv10, dv1)]
    found = [torch.cat(pair, 1) for pair in pairs]
    if backend is not Backend.twin:
        compare(found, lambda q, k, v: twin(q, k, v, whole), inputs, dtype)
        return
    expected = outputs_and_gradients(lambda q, k, v: twin(q, k, v, whole), inputs, 1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not ON_GPU, reason="nothing to wait for")
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_backend_waits_for_the_device(backend: Backend) -> None:
    tokens, starts = ROWS["long"]
    documents = documents_of(tokens, starts)
    q, k, v = (x.bfloat16().requires_grad_() for x in draw(2, tokens, (4, 2), 128))
    grad = torch.ones_like(q)
    softmax_attention_flash(q, k, v, documents, backend).backward(
        grad
    )  # what is built at the first call may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        softmax_attention_flash(q, k, v, documents, backend).backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_wide_numbers_are_the_twin_s() -> None:
    tokens, starts = ROWS["short"]
    documents = documents_of(tokens, starts)
    inputs = [x.float() for x in draw(2, tokens, (4, 2), 32)]
    found, expected = (
        outputs_and_gradients(lambda q, k, v, op=op: op(q, k, v, documents), inputs, 1)
        for op in (softmax_attention, twin)
    )
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("changes", "backend", "reason"),
    [
        ({}, Backend.flash4, "flash-attn-4 is installed"),
        (
            {"knows_lengths": False, "has_cudnn": False, "is_deterministic": True},
            Backend.flash4,
            "is installed",
        ),
        ({"has_flash4": False}, Backend.cudnn, "no flash-attn-4 that works"),
        ({"has_flash4": False, "knows_lengths": False}, Backend.flash2, "lengths are only on the device"),
        ({"has_flash4": False, "is_deterministic": True}, Backend.flash2, "do not repeat bit by bit"),
        ({"has_flash4": False, "has_cudnn": False}, Backend.flash2, "torch has no cuDNN"),
        ({"capability": (8, 0)}, Backend.flash2, "need compute capability 9.0, this is (8, 0)"),
        ({"capability": (10, 0)}, Backend.flash4, "is installed"),
        ({"capability": None}, Backend.twin, "not on a GPU"),
        ({"dtype": torch.float32}, Backend.twin, "no torch.float32"),
        ({"head_dim": 192}, Backend.flash2, "need head_dim <= 128, not 192"),
        ({"head_dim": 20}, Backend.twin, "head_dim 20 is no multiple of 8"),
        ({"head_dim": 264}, Backend.twin, "up to 256"),
    ],
)
def test_choice(changes: dict, backend: Backend, reason: str) -> None:
    named = {"dtype": torch.bfloat16, "head_dim": 128, **EVERYTHING, **changes}
    named["has_flash4"] = partial(bool, named["has_flash4"])
    found, why = choose_backend(named.pop("dtype"), named.pop("head_dim"), **named)
    assert found is backend
    assert reason in why


def test_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    announce.cache_clear()
    tokens, starts = ROWS["short"]
    q, k, v = (x.float() for x in draw(2, tokens, (2, 1), 8))
    with caplog.at_level(logging.INFO, logger="kernels.softmax_attention"):
        for _ in range(3):
            softmax_attention(q, k, v, documents_of(tokens, starts))
    message = "softmax attention by twin: tensors are not on a GPU"
    if ON_GPU:
        message = (
            "softmax attention by twin, which takes memory in tokens^2: flash kernels know no torch.float32"
        )
    assert [record.getMessage() for record in caplog.records] == [message]


def test_a_twin_on_a_gpu_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    announce.cache_clear()
    if not ON_GPU:
        monkeypatch.setattr(Tensor, "is_cuda", property(lambda _: True), raising=False)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    q, k, v = (x.bfloat16() for x in draw(1, 63, (2, 1), 20))
    for _ in range(2):
        softmax_attention(q, k, v, documents_of(63, [[0]]))
    reason = "head_dim 20 is no multiple of 8 up to 256"
    message = f"softmax attention by twin, which takes memory in tokens^2: {reason}"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("WARNING", message)]


def test_planned_lengths() -> None:
    """Few, and never far above what is needed."""
    lengths = range(CUDNN_TOKENS, 2**17)
    planned = [planned_length(length) for length in lengths]
    assert all(length <= p < length * 1.125 for length, p in zip(lengths, planned, strict=True))
    assert planned == sorted(planned)
    assert len(set(planned)) <= 8 * 7 + 1
    assert {planned_length(2**n) for n in range(20)} == {2**n for n in range(20)}


def test_long_documents_stand_alone() -> None:
    bounds = [0, 0, 2, 3, 13, 33, 34, 34, 35, 45, 45]
    pieces = cut_documents(bounds, 10)
    assert [(bounds[a], bounds[b]) for a, b in pieces] == [(0, 3), (3, 13), (13, 33), (33, 35), (35, 45)]
    assert cut_documents([0, 5], 10) == cut_documents([0, 50], 10) == [(0, 1)]
    assert cut_documents([0, 0, 0], 10) == []


def test_spans_of_documents() -> None:
    """The same from the host and from the device, which does not know the longest."""
    tokens, starts = 9, [[0, 4], [0], [0, 1, 8]]
    documents = documents_of(tokens, starts)
    spans = document_spans(documents, tokens)
    assert spans.on_host == spans.queries.tolist() == [0, 4, 9, 9, 18, 18, 18, 19, 26, 27]
    assert spans.most_queries == spans.most_keys == 9
    assert max(b - a for a, b in pairwise(spans.on_host)) == 9
    unknown = document_spans(documents._replace(on_host=None), tokens)
    assert unknown.on_host is None
    assert unknown.most_queries == tokens
    assert torch.equal(unknown.queries, spans.queries)
    assert document_spans(documents_of(9, [[0, 3, 5], [0, 4, 6]]), 9).most_queries == 4
