"""Context parallelism against the twins on full rows: values, gradients, bytes sent, collectives."""

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.documents import Documents, locate_documents
from kernels.reference import lightning_attention, softmax_attention
from kernels.softmax_attention import attend, attend_backward
from model.config import ModelConfig
from model.init import init_slice
from model.lightning import LightningCore
from model.transformer import Transformer
from parallel.collectives import Axis, all_reduce_sum
from parallel.config import StateExchange
from parallel.context import PrefixStateCore, ZigzagLocator, apply_context, zigzag
from parallel.mesh import one_process
from parallel.pool import StagePool
from parallel.ring import RingCore, find_crossings
from tests.support.dist import run_distributed

CHUNK = 7
MODEL = ModelConfig(
    num_layers=3,
    hidden_size=20,
    num_heads=3,
    num_kv_heads=1,
    head_dim=6,
    rotary_dim=4,
    vocab_size=53,
    num_experts=5,
    expert_ffn_size=12,
    softmax_every=2,
)


def context_axis(rank: int, size: int) -> Axis:
    return Axis("cp", rank, tuple(range(size)), dist.group.WORLD)


def layouts(chunks: int, trials: int) -> list[list[list[int]]]:
    """Document starts of two rows: special cases, then random ones that like chunk edges and length 1."""
    generator = random.Random(0)
    tokens = chunks * CHUNK
    edges = list(range(0, tokens, CHUNK))
    rows = [
        [0],
        edges,
        list(range(tokens)),
        [0, CHUNK + 3, tokens - CHUNK - 2],
        [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, tokens - 1],
        [0, CHUNK, tokens - CHUNK],
    ]
    for _ in range(2 * trials):
        cuts = set(generator.sample(range(1, tokens), generator.randint(0, 5)))
        cuts |= set(generator.sample(edges[1:], generator.randint(0, 2)))
        cuts |= {cut + 1 for cut in cuts if cut + 1 < tokens and generator.random() < 0.3}
        rows.append([0, *sorted(cuts)])
    return [[rows[i], rows[i + 1]] for i in range(0, len(rows), 2)]


def padded(starts: list[list[int]], tokens: int) -> Tensor:
    width = max(map(len, starts)) + 1
    return torch.tensor([row + [tokens] * (width - len(row)) for row in starts], dtype=torch.int32)


def lightning_core(heads: int, dtype: torch.dtype = torch.float64) -> LightningCore:
    core = LightningCore(MODEL, 0).to(dtype)
    core.slope_values = [0.9, 0.1, 0.004][:heads]
    core.slopes = core.slopes[:heads].clone()
    core.reset_buffers()
    return core


def compare_core(core: nn.Module, twin, starts: list[list[int]], heads: int, kv_heads: int, cp: Axis) -> None:
    """o, dq, dk, dv of this rank's tokens in fp64, with a filler that takes part in the gradients."""
    tokens = 2 * cp.size * CHUNK
    shapes = [(2, tokens, heads, 6), *[(2, tokens, kv_heads, 6)] * 2]
    q, k, v = leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    upstream, weight = torch.randn_like(q), torch.randn(6, dtype=torch.float64)
    offsets = padded(starts, tokens)
    expected = twin(q, k, v, locate_documents(offsets, tokens))
    expected_grads = torch.autograd.grad((expected * upstream * (q * weight).sigmoid()).sum(), leaves)

    documents = ZigzagLocator(cp)(offsets, tokens // cp.size)
    local = [zigzag(x.detach(), cp).requires_grad_() for x in leaves]
    actual, gate = core(*local, documents, filler=lambda: (local[0] * weight).sigmoid())
    grads = torch.autograd.grad((actual * zigzag(upstream, cp) * gate).sum(), local)
    torch.testing.assert_close(actual, zigzag(expected, cp), rtol=1e-10, atol=1e-10)
    for name, mine, full in zip("qkv", grads, expected_grads, strict=True):
        torch.testing.assert_close(
            mine, zigzag(full, cp), rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"d{n} of {starts}: {m}"
        )


def compare_ring(rank: int, size: int, trials: int) -> None:
    cp = context_axis(rank, size)
    torch.manual_seed(0)
    for number, starts in enumerate(layouts(2 * size, trials)):
        heads, kv_heads = [(1, 1), (3, 1), (2, 2)][number % 3]
        compare_core(RingCore(cp), softmax_attention, starts, heads, kv_heads, cp)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ring_is_attention_over_the_whole_row(size: int) -> None:
    run_distributed(compare_ring, size, size, 12)


def compare_states(rank: int, size: int, trials: int, exchange: StateExchange) -> None:
    cp = context_axis(rank, size)
    torch.manual_seed(0)
    for number, starts in enumerate(layouts(2 * size, trials)):
        local = lightning_core(heads := 1 + number % 3)
        core = PrefixStateCore(local, cp, exchange=exchange)

        def twin(q: Tensor, k: Tensor, v: Tensor, documents: Documents, slopes=local.slopes) -> Tensor:
            return lightning_attention(q, k, v, slopes, documents)

        compare_core(core, twin, starts, heads, heads, cp)


@pytest.mark.parametrize("exchange", StateExchange)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_prefix_states_are_the_recurrence_over_the_whole_row(size: int, exchange: StateExchange) -> None:
    run_distributed(compare_states, size, size, 12, exchange)


def check_placement(rank: int, size: int) -> None:
    cp = context_axis(rank, size)
    tokens = 2 * size * CHUNK
    offsets = padded([[0, 3, CHUNK, tokens - 1], [0]], tokens)
    mine = [*range(rank * CHUNK, (rank + 1) * CHUNK)]
    mine += range((2 * size - 1 - rank) * CHUNK, (2 * size - rank) * CHUNK)
    whole, local = locate_documents(offsets, tokens), ZigzagLocator(cp)(offsets, tokens // size)
    assert torch.equal(local.ids, whole.ids[:, mine])
    assert torch.equal(local.positions, whole.positions[:, mine])
    assert torch.equal(local.offsets, offsets)
    assert torch.equal(zigzag(torch.arange(tokens), cp, dim=0), torch.tensor(mine))
    with pytest.raises(ValueError, match=f"must be a multiple of 2 \\* cp = {2 * size}"):
        zigzag(torch.zeros(2, tokens + size), cp)
    odd = torch.zeros(2, 5, 1, 6)
    local = Documents(offsets, local.ids[:, :5], local.positions[:, :5])
    for core in (RingCore(cp), PrefixStateCore(lightning_core(1), cp)):
        with pytest.raises(ValueError, match="must be even"):
            core(odd, odd, odd, local, filler=lambda: None)


def test_zigzag_and_documents() -> None:
    run_distributed(check_placement, 3, 3)


def test_one_rank_is_the_local_form() -> None:
    alone = Axis("cp", 0, (0,))
    x = torch.randn(2, 9, 3, 6)
    offsets = padded([[0, 4], [0]], 9)
    documents = ZigzagLocator(alone)(offsets, 9)
    assert zigzag(x, alone) is x
    assert torch.equal(documents.ids, locate_documents(offsets, 9).ids)
    core = lightning_core(3, torch.float32)
    o, filled = PrefixStateCore(core, alone)(x, x, x, documents, filler=lambda: 5)
    assert filled == 5
    assert torch.equal(o, lightning_attention(x, x, x, core.slopes, documents))
    assert torch.equal(
        RingCore(alone)(x, x, x, documents, filler=lambda: 5)[0], softmax_attention(x, x, x, documents)
    )
    model = Transformer(MODEL)
    cores = [block.mixer.core for block in model.blocks.values()]
    apply_context(model, alone)
    assert model.locate is locate_documents
    assert [block.mixer.core for block in model.blocks.values()] == cores


def sent_bytes(starts: list[list[int]], cp: Axis, dtype: torch.dtype) -> tuple[int, int]:
    """Of all ranks: forward, and forward with backward; 2 rows, 1 kv head of 6."""
    tokens = 2 * cp.size * CHUNK
    q, k, v = (torch.randn(2, 2 * CHUNK, 1, 6, dtype=dtype, requires_grad=True) for _ in range(3))
    core = RingCore(cp)
    o, _ = core(q, k, v, ZigzagLocator(cp)(padded(starts, tokens), tokens // cp.size), filler=lambda: None)
    forward = core.sent_bytes
    o.sum().backward()
    forward, both = all_reduce_sum(torch.tensor([forward, core.sent_bytes]), cp).tolist()
    return forward, both


def check_bytes(rank: int, size: int) -> None:
    cp = context_axis(rank, size)
    tokens = 2 * size * CHUNK
    edges = list(range(0, tokens, CHUNK))
    with mock.patch.object(dist, "batch_isend_irecv", side_effect=AssertionError):
        assert sent_bytes([edges, sorted({*edges, 3, CHUNK + 1})], cp, torch.float32) == (0, 0)
    key = 2 * 6  # k and v of one head
    # A document of 5 tokens over the first edge: 2 keys go from rank 0 to rank 1, in backward again and back.
    one = [[*edges[:1], CHUNK - 2, CHUNK + 3, *edges[2:]], edges]
    assert sent_bytes(one, cp, torch.bfloat16) == (2 * key * 2, 2 * key * (2 + 2 + 4))
    assert sent_bytes(one, cp, torch.float64) == (2 * key * 8, 2 * key * 8 * 3)
    # The middle edge lies inside rank cp - 1.
    middle = [[*edges[:size], size * CHUNK - 2, size * CHUNK + 2, *edges[size + 1 :]], edges]
    assert sent_bytes(middle, cp, torch.float32) == (0, 0)
    # One document: each chunk goes once to every other rank that owns a later one.
    needed = sum(
        any(chunk > j for chunk in (r, 2 * size - 1 - r))
        for j in range(2 * size)
        for r in range(size)
        if r != min(j, 2 * size - 1 - j)
    )
    assert sent_bytes([[0], edges], cp, torch.float32)[0] == needed * CHUNK * key * 4


@pytest.mark.parametrize("size", [2, 4])
def test_only_keys_that_documents_reach_are_sent(size: int) -> None:
    run_distributed(check_bytes, size, size)


def test_crossings_are_the_document_mask() -> None:
    """They say every (later queries, earlier keys) mask of two chunks: one rectangle or nothing."""
    for starts in layouts(6, 30):
        offsets = padded(starts, 6 * CHUNK)
        ids = locate_documents(offsets, 6 * CHUNK).ids
        expected = ids[:, :, None] == ids[:, None]
        actual = torch.zeros_like(expected)
        for row, chunk, start, stop in find_crossings(offsets.tolist(), CHUNK, 6):
            edge = (chunk + 1) * CHUNK
            actual[row, edge:stop, edge - CHUNK + start : edge] = True
        of_chunk = torch.arange(6 * CHUNK) // CHUNK
        assert torch.equal(actual, expected & (of_chunk[:, None] > of_chunk))


@contextmanager
def counted() -> Iterator[Counter]:
    """Calls of torch.distributed's communication."""
    calls: Counter = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather_into_tensor", "batch_isend_irecv", "send", "recv", "all_reduce"):
            original = getattr(dist, name)

            def call(*args, name=name, original=original, **kwargs):
                calls[name] += 1
                return original(*args, **kwargs)

            patch.setattr(dist, name, call)
        yield calls


def check_one_gather_each_way(rank: int, size: int) -> None:
    """And it overlaps: the filler runs between start and wait, its gradient between those of backward."""
    cp = context_axis(rank, size)
    events: list[str] = []
    start = dist.all_gather_into_tensor

    def gather(*args, **kwargs):
        events.append("start")
        assert args[1].shape == (2, 1, 2, 6, 6)
        work = start(*args, **kwargs)
        wait = mock.Mock(side_effect=lambda: (events.append("wait"), work.wait()))
        return mock.Mock(wait=wait)

    q, k, v = (torch.randn(1, 2 * CHUNK, 2, 6, requires_grad=True) for _ in range(3))
    x = torch.randn(3, requires_grad=True)

    def filler() -> Tensor:
        events.append("filler")
        y = x * 2
        y.register_hook(lambda grad: events.append("filler"))
        return y

    documents = ZigzagLocator(cp)(padded([[0, 4]], 2 * size * CHUNK), 2 * CHUNK)
    with mock.patch.object(dist, "all_gather_into_tensor", gather), counted() as calls:
        o, gate = PrefixStateCore(lightning_core(2, torch.float32), cp)(q, k, v, documents, filler=filler)
        assert events == ["start", "filler", "wait"]
        (o.sum() * gate.sum()).backward()
    assert events == ["start", "filler", "wait"] * 2
    assert calls == Counter(all_gather_into_tensor=2)


def test_one_gather_each_way() -> None:
    run_distributed(check_one_gather_each_way, 3, 3)


def check_transfers_before_compute(rank: int, size: int) -> None:
    """One document over everything: each step's keys are on their way before the step before computes."""
    cp = context_axis(rank, size)
    events: list[str] = []

    def recorded(name: str, original):
        return lambda *args, **named: (events.append(name), original(*args, **named))[1]

    q, k, v = (torch.randn(1, 2 * CHUNK, 1, 6, requires_grad=True) for _ in range(3))
    documents = ZigzagLocator(cp)(padded([[0]], 2 * size * CHUNK), 2 * CHUNK)
    with (
        mock.patch.object(dist, "batch_isend_irecv", recorded("P", dist.batch_isend_irecv)),
        mock.patch("parallel.ring.attend", recorded("c", attend)),
        mock.patch("parallel.ring.attend_backward", recorded("c", attend_backward)),
    ):
        o, _ = RingCore(cp)(q, k, v, documents, filler=lambda: None)
        forward = "".join(events)
        events.clear()
        o.sum().backward()
    # Own pairs first (both diagonals at once, one rectangle), then 2 rectangles with each other rank.
    assert forward == "Pcc" + "Pcc" * (size - 2) + "cc"
    # Behind each later step's compute, the gradients of its keys go back.
    assert "".join(events) == "Pcc" + "PccP" * (size - 2) + "ccP"


def test_transfers_are_posted_before_compute() -> None:
    run_distributed(check_transfers_before_compute, 3, 3)


def build(dtype: torch.dtype = torch.float32) -> Transformer:
    with torch.device("meta"):
        model = Transformer(MODEL)
    model.to_empty(device="cpu")
    model.reset_buffers()
    for name, parameter in model.named_parameters():
        whole = {"shape": tuple(parameter.shape), "offset": (0,) * parameter.dim()}
        init_slice(parameter.data, name, **whole, cfg=MODEL, seed=7)
    return model.to(dtype)


def backward(model: Transformer, tokens: Tensor, targets: Tensor, offsets: Tensor) -> Tensor:
    loss = model(tokens, offsets, targets=targets, loss_weight=10.0).sum() / 100
    loss.backward()
    return loss.detach()


def compare_model(rank: int, size: int, exchange: StateExchange) -> None:
    cp = context_axis(rank, size)
    row = 2 * size * CHUNK
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(53, (2, 2, row), generator=generator)
    targets[:, 4] = -100
    offsets = padded([[0, 5, 6, row - CHUNK - 2], [0, CHUNK, 2 * CHUNK + 3]], row)
    whole, part = build(), build()
    apply_context(part, cp, exchange=exchange)
    part.reset_buffers()
    for router in part.routers():
        router.pool = StagePool(replace(one_process(torch.device("cpu")), stage=cp, cp=cp))
    expected = backward(whole, tokens, targets, offsets)
    with counted() as calls:
        actual = backward(part, zigzag(tokens, cp), zigzag(targets, cp), offsets)
    lightning = 2
    if exchange is StateExchange.allgather:
        assert calls["all_gather_into_tensor"] == 2 * lightning
    assert calls["batch_isend_irecv"] <= 3 * (size - 1)
    torch.testing.assert_close(all_reduce_sum(actual, cp), expected, rtol=1e-5, atol=0)
    largest = max(p.grad.abs().max() for p in whole.parameters())
    for (name, full), mine in zip(whole.named_parameters(), part.parameters(), strict=True):
        total = all_reduce_sum(mine.grad, cp)
        error = (total - full.grad).abs().max() / max(full.grad.abs().max(), 1e-3 * largest)
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize(("size", "exchange"), [(2, "allgather"), (3, "allgather"), (4, "scan")])
def test_model_against_one_process(size: int, exchange: str) -> None:
    run_distributed(compare_model, size, size, StateExchange(exchange))


def check_slopes(rank: int) -> None:
    """Heads cut over tp before: the core keeps their slopes, also after a move from the meta device."""
    with torch.device("meta"):
        model = Transformer(MODEL)
        core = model.blocks["0"].mixer.core
        core.slope_values, core.slopes = core.slope_values[1:], core.slopes[1:]
        expected = core.slope_values
        apply_context(model, context_axis(rank, 2))
    model.to_empty(device="cpu")
    model.reset_buffers()
    slopes = dict(model.named_buffers())["blocks.0.mixer.core.slopes"]
    torch.testing.assert_close(slopes, torch.tensor(expected))
    assert "blocks.0.mixer.core.slopes" not in model.state_dict()


def test_slopes_after_tensor_parallelism() -> None:
    run_distributed(check_slopes, 2)
