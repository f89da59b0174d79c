"""The lightning kernels against their twins: values, states, all gradients."""

import pytest
import torch
from torch import Tensor

from kernels.documents import Documents, locate_documents
from kernels.lightning_attention import (
    CONFIGS,
    Config,
    _has_kernel,
    lightning_attention_triton,
    lightning_end_state_triton,
    plan_layout,
)
from kernels.lightning_attention import lightning_attention as public_lightning_attention
from kernels.reference import (
    carry_state,
    lightning_attention,
    lightning_attention_with_state,
    lightning_end_state,
)
from tests.support.kernel_checks import DEVICE, DTYPES, check_against_twin, random_tensor

ON_GPU = DEVICE.type == "cuda"
SMALL = Config(16, 16, 4, 2)
"""Enough chunks and blocks of columns in little time under the interpreter."""


def documents_of(tokens: int, *starts: list[int]) -> Documents:
    """Rows whose documents begin at 0 and at these places."""
    rows = [[0, *row] for row in starts]
    width = max(map(len, rows)) + 1
    padded = [row + [tokens] * (width - len(row)) for row in rows]
    return locate_documents(torch.tensor(padded, dtype=torch.int32, device=DEVICE), tokens)


def slopes_of(heads: int, *, fastest: float = 0.92, slowest: float = 0.004) -> Tensor:
    ratio = (slowest / fastest) ** (1 / max(1, heads - 1))
    return torch.tensor([fastest * ratio**h for h in range(heads)], device=DEVICE)


def compare(
    tokens: int,
    starts: list[list[int]],
    *,
    heads: int = 2,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
    config: Config | None = SMALL,
    segments: int | None = 1,
    slowest: float = 0.004,
) -> None:
    documents = documents_of(tokens, *starts)
    slopes = slopes_of(heads, slowest=slowest)
    shape = (len(starts), tokens, heads, size)
    q, k, v = (random_tensor(*shape, seed=i) for i in range(3))
    initial = random_tensor(len(starts), heads, size, size, seed=3)
    layout = plan_layout(q.to(dtype), config, segments)

    def kernel(q: Tensor, k: Tensor, v: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        state = lightning_end_state_triton(k, v, slopes, documents.positions, layout)
        o = lightning_attention_triton(q, k, v, slopes, documents.positions, initial, layout)
        return o, carry_state(initial, state, slopes, documents)

    def twin(q: Tensor, k: Tensor, v: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        return lightning_attention_with_state(q, k, v, slopes, documents, initial_state=initial)

    check_against_twin(kernel, twin, [q, k, v, initial], dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "starts"),
    [
        (1, [[]]),
        (16, [[]]),
        (17, [[16], [1, 2, 16]]),
        (63, [[5, 6, 7, 48], [32]]),
        (100, [[], [99]]),
    ],
)
def test_values_states_and_gradients(tokens: int, starts: list[list[int]], dtype: torch.dtype) -> None:
    """Documents of one token, on and off the chunks' borders, over several chunks; what enters a row."""
    compare(tokens, starts, dtype=dtype)


@pytest.mark.parametrize("segments", [2, 3, 5])
def test_segments_side_by_side(segments: int) -> None:
    """The states' own pass: documents that end in, begin in, and reach over segments."""
    compare(75, [[33], [16, 48, 74]] if segments < 5 else [[], [40, 41]], segments=segments)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [(c, d) for c in CONFIGS for d in DTYPES if c.chunk <= 32 or d is not torch.float32],
)
def test_every_config(config: Config, dtype: torch.dtype) -> None:
    """One document over whole chunks, heads that forget at once and hardly ever."""
    compare(3 * config.chunk + 9, [[5]], heads=3, size=32, config=config, dtype=dtype)
    if ON_GPU:
        for size in (64, 128):
            compare(1000, [[70, 71, 500], [999]], heads=3, size=size, config=config, dtype=dtype, segments=2)


@pytest.mark.parametrize("size", [48, *([80, 96, 112, 128, 144, 192, 240, 256] if ON_GPU else [])])
def test_head_sizes(size: int) -> None:
    for dtype in DTYPES:
        compare(70, [[9]], heads=1, size=size, dtype=dtype, config=None)


@pytest.mark.parametrize("dtype", DTYPES[1:] if ON_GPU else DTYPES)
def test_long_rows(dtype: torch.dtype) -> None:
    """Many chunks, in the layout that the public op chooses; heads that forget at once and hardly ever.

    In fp32 the public op is the twin on a GPU: 8191 tokens one after the other err four times as much there.
    """
    starts = [[1, 2, 65, 300, 301, 302], []]
    if not ON_GPU:
        return compare(310, starts, dtype=dtype, config=None, slowest=5e-5)
    compare(8191, starts, heads=8, size=128, dtype=dtype, config=None, segments=None, slowest=5e-5)
    compare(8191, starts, heads=64, size=128, dtype=dtype, config=None, segments=None)


@pytest.mark.skipif(not ON_GPU, reason="20 GB of memory")
def test_past_2_to_the_31_entries() -> None:
    """The last document of a row that is too long for 32 bits, against the same one alone."""
    tokens, last, heads, size = 704 * 128, 1000, 64, 128
    slopes = slopes_of(heads)
    packed = torch.zeros(1, tokens, heads, 3 * size, dtype=torch.bfloat16, device=DEVICE)
    packed[:, -last:] = random_tensor(1, last, heads, 3 * size, seed=11, dtype=torch.bfloat16)
    assert packed.numel() > 2**31
    upstream = random_tensor(1, last, heads, size, seed=12, dtype=torch.bfloat16)
    found = []
    for piece, starts in ((packed, [tokens - last]), (packed[:, -last:].clone(), [])):
        documents = documents_of(piece.shape[1], starts)
        leaves = [x.detach().requires_grad_() for x in piece.chunk(3, -1)]
        o = lightning_attention_triton(*leaves, slopes, documents.positions)
        state = lightning_end_state_triton(*leaves[1:], slopes, documents.positions)
        grads = torch.autograd.grad(o[:, -last:], leaves, upstream)
        found.append([o[:, -last:].detach(), state.detach(), *(x[:, -last:] for x in grads)])
    for mine, right in zip(*found, strict=True):
        torch.testing.assert_close(mine, right, rtol=0.02, atol=0.02 * float(right.abs().max()))


def test_without_initial_state_and_with_parts_of_one_tensor() -> None:
    """q, k and v read in place, gradients that lie in one tensor."""
    documents = documents_of(40, [7, 20])
    slopes = slopes_of(2)

    def kernel(packed: Tensor) -> Tensor:
        return lightning_attention_triton(*packed.chunk(3, -1), slopes, documents.positions)

    def twin(packed: Tensor) -> Tensor:
        return lightning_attention(*packed.chunk(3, -1), slopes, documents)

    check_against_twin(kernel, twin, [random_tensor(1, 40, 2, 48, seed=5)], dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "starts", "segments"),
    [
        (1, [[]], 1),
        (63, [[62], [61], [1, 2]], 1),
        (75, [[], [33], [74], [5, 40]], 1),
        (75, [[], [33], [74], [5, 40]], 3),
        (500, [[], [3]], 2),
    ],
)
def test_end_state(tokens: int, starts: list[list[int]], segments: int, dtype: torch.dtype) -> None:
    """The state that LASP+ sends, and its gradients; as exact as plain torch in fp32, whatever the dtype."""
    documents = documents_of(tokens, *starts)
    slopes = slopes_of(2)
    k, v = (random_tensor(len(starts), tokens, 2, 16, seed=i) for i in (6, 7))
    layout = plan_layout(k.to(dtype), Config(64, 16, 4, 2) if tokens > 100 else SMALL, segments)
    check_against_twin(
        lambda k, v: lightning_end_state_triton(k, v, slopes, documents.positions, layout),
        lambda k, v: lightning_end_state(k, v, slopes, documents),
        [k, v],
        dtype=dtype,
    )


def test_a_row_in_two_parts() -> None:
    """The state after the first half, given to the second, makes the whole."""
    slopes = slopes_of(2)
    q, k, v = (random_tensor(1, 60, 2, 16, seed=i, dtype=torch.float32) for i in (8, 9, 10))
    whole = lightning_attention(q, k, v, slopes, documents_of(60, [20]))
    begin, end = ([x[:, :37] for x in (q, k, v)], [x[:, 37:] for x in (q, k, v)])
    positions = documents_of(37, [20]).positions
    first = lightning_attention_triton(*begin, slopes, positions)
    state = lightning_end_state_triton(*begin[1:], slopes, positions)
    second = lightning_attention_triton(*end, slopes, documents_of(23, []).positions, state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "size", "reason"),
    [
        (torch.float32, 16, "the kernels take bf16 and fp16, not torch.float32"),
        (torch.float16, 24, "head_dim 24 is no multiple of 16 up to 256"),
        (torch.float16, 272, "head_dim 272 is no multiple of 16 up to 256"),
    ],
)
def test_the_twin_on_a_gpu_is_a_warning(
    dtype: torch.dtype,
    size: int,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _has_kernel.cache_clear()
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda _: True), raising=False)
    x = torch.zeros(1, 5, 1, size, dtype=dtype, device=DEVICE)
    for _ in range(2):
        public_lightning_attention(x, x, x, slopes_of(1), documents_of(5, []))
    message = f"lightning attention by plain torch, which is much slower: {reason}"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("WARNING", message)]
