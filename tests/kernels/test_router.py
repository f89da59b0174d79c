"""The router's kernels against their twins: choices, weights and their gradients, sums, record."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.reference import Balance, Record
from kernels.reference import choose_experts as choose_experts_by_sort
from kernels.reference import record_choices as record_choices_by_torch
from kernels.reference import route as route_by_torch
from kernels.router import CONFIGS, Config, choose_experts_triton, record_choices_triton, route_triton
from tests.kernels.harness import DEVICE, DTYPES, check_against_twin, errors, random_tensor

SHAPES = [  # tokens, experts, top_k
    (0, 4, 2),
    (1, 1, 1),
    (63, 5, 1),
    (63, 33, 8),
    (130, 32, 2),
    (9, 160, 8),
    *(
        (1000, experts, top_k)
        for experts in (8, 32, 160, 512)
        for top_k in (1, 2, 8)
        if DEVICE.type == "cuda"
    ),
]
EPS = torch.finfo(torch.float32).eps


def draw_logits(tokens: int, experts: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    """fp32."""
    return random_tensor(tokens, experts, seed=seed, dtype=torch.float32, scale=scale)


def draw_real(tokens: int) -> Tensor:
    """[tokens] bool: the last third is padding."""
    return torch.arange(tokens, device=DEVICE) < tokens - tokens // 3


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["plain", "real", "bias"])
def test_choices_and_sums(shape: tuple[int, int, int], kind: str, config: Config) -> None:
    """The twin's experts, and sums that err no more than twice as much as its own."""
    tokens, experts, top_k = shape
    logits = draw_logits(tokens, experts)
    real = draw_real(tokens) if kind == "real" else None
    bias = random_tensor(experts, seed=1, dtype=torch.float32) if kind == "bias" else None
    chosen, sums = choose_experts_triton(logits, top_k, bias=bias, real=real, config=config)
    expected, by_twin = choose_experts_by_sort(logits, top_k, bias=bias, real=real)
    truth = choose_experts_by_sort(logits.double(), top_k, bias=bias, real=real)[1][0]
    assert torch.equal(chosen, expected)
    assert sums.isfinite().all()
    for columns in (slice(experts), slice(experts, experts + 1), slice(experts + 1, None)):
        allowed = errors(by_twin[0, columns], truth[columns])
        for mine, theirs in zip(errors(sums.sum(0)[columns], truth[columns]), allowed, strict=True):
            assert mine <= 2 * theirs + 4 * EPS  # experts or tokens add to 4 EPS where the twin is exact
    again = choose_experts_triton(logits, top_k, bias=bias, real=real, config=config)
    assert torch.equal(chosen, again[0]) and torch.equal(sums, again[1])


def test_equal_logits_choose_the_first_experts() -> None:
    """Also -0 and 0; infinite and NaN logits still name different experts that exist."""
    logits = draw_logits(64, 33).round().clamp(-1, 1)
    logits = torch.where(torch.arange(33, device=DEVICE) % 2 == 0, logits, logits.abs().neg())
    assert (logits == 0).any() and torch.signbit(logits[logits == 0]).any()
    chosen, _ = choose_experts_triton(logits, 8)
    assert torch.equal(chosen, choose_experts_by_sort(logits, 8)[0])
    assert torch.equal(choose_experts_triton(logits * 0, 3)[0], torch.arange(3, device=DEVICE).expand(64, 3))
    for value in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        odd = logits.clone()
        odd[:, 3:] = value
        found = choose_experts_triton(odd, 8)[0].sort(-1).values
        assert (found >= 0).all() and (found < 33).all() and (found.diff() > 0).all()


def test_a_token_chooses_alike_among_any_others() -> None:
    """Any number of tokens, any place among them: the same experts and weights to the last bit."""
    logits, bias = draw_logits(150, 32), random_tensor(32, seed=1, dtype=torch.float32, scale=1e-3)
    experts, _ = choose_experts_triton(logits, 2, bias=bias)
    weights = route_triton(logits, experts)
    for part in (slice(0, 1), slice(7, 71), slice(100, 150)):
        mine, _ = choose_experts_triton(logits[part], 2, bias=bias)
        assert torch.equal(mine, experts[part])
        assert torch.equal(route_triton(logits[part], mine), weights[part])


def test_parts_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = draw_logits(401, 32)
    expected = choose_experts_triton(logits, 2)
    monkeypatch.setattr("kernels.router.MAX_PARTS", 3)
    experts, sums = choose_experts_triton(logits, 2)
    assert len(sums) == 3 and len(expected[1]) == 7
    assert torch.equal(experts, expected[0])
    torch.testing.assert_close(sums.sum(0), expected[1].sum(0))


def draw_balance(tokens: int, experts: int, kind: str) -> Callable[[torch.dtype], Balance | None]:
    """Losses of about the size of the weights' gradient, or none."""
    if kind == "plain":
        return lambda dtype: None
    real, share = draw_real(tokens) if kind == "real" else None, random_tensor(experts, seed=3).square()
    total = torch.tensor(1.5 * tokens + 1, device=DEVICE)
    return lambda dtype: Balance(real, share.to(dtype), total.to(dtype), experts, 3.0, 0.2, 40.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["plain", "balance", "real"])
def test_weights_and_gradients(shape: tuple[int, int, int], kind: str, dtype: torch.dtype) -> None:
    """A third of the choices is dropped, some tokens lose all; the balancing losses ride along."""
    tokens, experts, top_k = shape
    chosen = choose_experts_by_sort(draw_logits(tokens, experts), top_k)[0]
    generator = torch.Generator().manual_seed(2)
    replicas = torch.randint(-1, 2, chosen.shape, generator=generator).to(DEVICE)
    balance = draw_balance(tokens, experts, kind)
    for config in CONFIGS:
        check_against_twin(
            lambda x, config=config: route_triton(
                x, chosen, replicas=replicas, balance=balance(torch.float32), config=config
            ),
            lambda x: route_by_torch(
                x, chosen, replicas=replicas, balance=balance(torch.promote_types(x.dtype, torch.float32))
            ),
            [draw_logits(tokens, experts).double()],
            dtype=dtype,
        )


def test_weights_without_drops_and_out_of_range() -> None:
    """Chosen experts of hardly any probability, as when choices are forced."""
    logits = torch.tensor([[0.0, 1.0, 2.0], [90.0, 0.0, 1.0], [-300.0, 0.0, -301.0]], device=DEVICE)
    experts = torch.tensor([[2, 1], [2, 1], [0, 2]], device=DEVICE)
    weights = route_triton(logits, experts)
    torch.testing.assert_close(weights, route_by_torch(logits, experts), rtol=1e-5, atol=0)
    assert not weights[2].any()


@pytest.mark.parametrize("experts", [1, 6, 32, 160])
@pytest.mark.parametrize("so_far", [False, True])
@pytest.mark.parametrize("has_dropped", [False, True])
def test_record(experts: int, so_far: bool, has_dropped: bool) -> None:
    """Two micro-batches in a row."""
    records = [
        Record(
            *(torch.zeros(experts, dtype=torch.int64, device=DEVICE) for _ in range(3)),
            torch.zeros(3, device=DEVICE),
        )
        for _ in range(2)
    ]
    generator = torch.Generator().manual_seed(experts)
    for tokens in (700, 63):
        sums = choose_experts_triton(draw_logits(tokens, experts, seed=tokens), 1)[1]
        choices = torch.randint(1, 3000, (experts,), generator=generator).to(DEVICE)
        dropped = choices // 3 if has_dropped else None
        found = [
            record_by(record, sums, choices, dropped, 4 * choices, top_k=2, scale=0.3, so_far=so_far)
            for record_by, record in zip(
                (record_choices_triton, record_choices_by_torch), records, strict=True
            )
        ]
        torch.testing.assert_close(*found, rtol=1e-6, atol=0)
        torch.testing.assert_close(*records, rtol=1e-6, atol=0)
    assert records[0].losses[:2].all() and records[0].dropped.any() == has_dropped
