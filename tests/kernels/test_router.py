"""The router's kernels against their twins: choices, weights and their gradients, sums, record."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.admission import line_up_triton
from kernels.counting import count_blocks
from kernels.reference import Balance, Record
from kernels.reference import choose_experts as choose_experts_by_sort
from kernels.reference import record_choices as record_choices_by_torch
from kernels.reference import route as route_by_torch
from kernels.router import CONFIGS, Config, choose_experts_triton, record_choices_triton, route_triton
from model.capacity import Places, decide_replicas_triton
from model.config import AuxScope, Balancing, ModelConfig, Renormalise, RouterConfig
from model.router import Memo, Micro, Router
from tests.support.kernel_checks import DEVICE, DTYPES, check_against_twin, errors, random_tensor

SHAPES = [  # tokens, experts, top_k
    (0, 4, 2),
    (1, 1, 1),
    (63, 5, 1),
    (63, 33, 8),
    (130, 32, 2),
    (9, 160, 8),
    *([(1000, 32, 2), (1000, 512, 8)] if DEVICE.type == "cuda" else []),
]
CASES = [
    *((shape, CONFIGS[0]) for shape in SHAPES),
    *((shape, config) for shape in ((130, 32, 2), (9, 160, 8)) for config in CONFIGS[1:]),
]
EPS = torch.finfo(torch.float32).eps


def draw_logits(tokens: int, experts: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    """fp32."""
    return random_tensor(tokens, experts, seed=seed, dtype=torch.float32, scale=scale)


def draw_real(tokens: int) -> Tensor:
    """[tokens] bool: the last third is padding."""
    return torch.arange(tokens, device=DEVICE) < tokens - tokens // 3


@pytest.mark.parametrize(("shape", "config"), CASES)
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
    if bias is None:
        assert torch.equal(chosen, expected)
    else:  # softmax rounds one way or the other
        scores = logits.double().softmax(-1) + bias
        torch.testing.assert_close(scores.gather(1, chosen), scores.gather(1, expected), rtol=0, atol=1e-6)
    assert sums.isfinite().all()
    for columns in (slice(experts), slice(experts, experts + 1), slice(experts + 1, None)):
        allowed = errors(by_twin[0, columns], truth[columns])
        for mine, theirs in zip(errors(sums.sum(0)[columns], truth[columns]), allowed, strict=True):
            assert mine <= 2 * theirs + 4 * EPS  # experts or tokens add to 4 EPS where the twin is exact
    again = choose_experts_triton(logits, top_k, bias=bias, real=real, config=config)
    assert torch.equal(chosen, again[0])
    assert torch.equal(sums, again[1])


def test_equal_logits_choose_the_first_experts() -> None:
    """Also -0 and 0; infinite and NaN logits still name different experts that exist."""
    logits = draw_logits(64, 33).round().clamp(-1, 1)
    logits = torch.where(torch.arange(33, device=DEVICE) % 2 == 0, logits, logits.abs().neg())
    assert (logits == 0).any()
    assert torch.signbit(logits[logits == 0]).any()
    chosen, _ = choose_experts_triton(logits, 8)
    assert torch.equal(chosen, choose_experts_by_sort(logits, 8)[0])
    assert torch.equal(choose_experts_triton(logits * 0, 3)[0], torch.arange(3, device=DEVICE).expand(64, 3))
    for value in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        odd = logits.clone()
        odd[:, 3:] = value
        found = choose_experts_triton(odd, 8)[0].sort(-1).values
        assert (found >= 0).all()
        assert (found < 33).all()
        assert (found.diff() > 0).all()


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
    assert len(sums) == 3
    assert len(expected[1]) == 7
    assert torch.equal(experts, expected[0])
    torch.testing.assert_close(sums.sum(0), expected[1].sum(0))


def draw_balance(tokens: int, experts: int, kind: str) -> Callable[[torch.dtype], Balance | None]:
    """Losses of about the size of the weights' gradient, or none."""
    if kind == "plain":
        return lambda dtype: None
    real, share = draw_real(tokens) if kind == "real" else None, random_tensor(experts, seed=3).square()
    total = torch.tensor(1.5 * tokens + 1, device=DEVICE)
    return lambda dtype: Balance(real, share.to(dtype), total.to(dtype), experts, 3.0, 0.2, 40.0)


@pytest.mark.parametrize(
    ("shape", "config", "dtype"),
    [*((*case, torch.float32) for case in CASES), *(((130, 32, 2), CONFIGS[0], d) for d in DTYPES[1:])],
)
@pytest.mark.parametrize("kind", ["plain", "balance", "real"])
def test_weights_and_gradients(
    shape: tuple[int, int, int], config: Config, dtype: torch.dtype, kind: str
) -> None:
    """A third of the choices is dropped, some tokens lose all; the balancing losses ride along."""
    tokens, experts, top_k = shape
    chosen = choose_experts_by_sort(draw_logits(tokens, experts), top_k)[0]
    generator = torch.Generator().manual_seed(2)
    replicas = torch.randint(-1, 2, chosen.shape, generator=generator).to(DEVICE)
    balance = draw_balance(tokens, experts, kind)
    check_against_twin(
        lambda x: route_triton(x, chosen, replicas=replicas, balance=balance(torch.float32), config=config),
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
    assert records[0].losses[:2].all()
    assert records[0].dropped.any() == has_dropped


OPTIONS: dict[str, dict[str, Any]] = {
    "no capacity": {"z_loss_coefficient": 0.3, "aux_loss_coefficient": 0.2},
    "capacity": {"capacity_factor": 1.0, "aux_loss_coefficient": 0.2},
    "capacity over the step": {
        "capacity_factor": 0.7,
        "aux_scope": AuxScope.global_batch,
        "renormalise": Renormalise.before_drop,
    },
    "bias": {"capacity_factor": 1.25, "balancing": Balancing.bias, "z_loss_coefficient": 0.1},
    "forced": {"capacity_factor": 1.0, "force": "skewed:1", "jitter": 0.1},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("has_padding", [False, True])
def test_router_by_kernels(name: str, has_padding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole router, two micro-batches, the second recomputed: decisions, gradients, statistics."""
    lengths = torch.tensor([40, 13, 33]) if has_padding else None
    expected = run_router(OPTIONS[name], lengths, torch.device("cpu"))
    if "capacity_factor" in OPTIONS[name] and not has_padding:
        assert all((replicas < 0).any() for replicas in expected["replicas"])

    def line_up(places: Places, offsets: Tensor, start: int) -> tuple[Tensor, Tensor]:
        size = {"num_rows": places.num_rows, "row_tokens": places.row_tokens}
        start %= places.num_rows * places.row_tokens
        return line_up_triton(places.rows, places.positions, places.split, offsets, **size, start=start)

    by_kernels = {
        "choose_experts": choose_experts_triton,
        "route": route_triton,
        "record_choices": record_choices_triton,
        "decide_replicas": decide_replicas_triton,
        "line_up": line_up,
        "count_keys": lambda keys, num_keys: count_blocks(keys, num_keys).sum(0)[:num_keys],
    }
    for op, kernel in by_kernels.items():
        monkeypatch.setattr(f"model.router.{op}", kernel)
    found = run_router(OPTIONS[name], lengths, DEVICE)
    for key, values in expected.items():
        for mine, theirs in zip(found[key], values, strict=True):
            torch.testing.assert_close(
                mine.cpu(), theirs, rtol=1e-5, atol=1e-6, msg=lambda m, key=key: key + m
            )


def run_router(
    options: dict[str, Any], lengths: Tensor | None, device: torch.device
) -> dict[str, list[Tensor]]:
    """What two micro-batches of three rows leave behind."""
    cfg = ModelConfig(
        num_layers=1, hidden_size=8, num_heads=1, num_kv_heads=1, head_dim=2, rotary_dim=2, vocab_size=8,
        num_experts=8, experts_per_token=2, expert_ffn_size=4,
    )  # fmt: skip
    router = Router(cfg, RouterConfig(**options), 0).to(device)
    router.gate.weight.data.copy_(torch.eye(8))
    router.bias.copy_(torch.linspace(0, 0.2, 8))
    offsets = torch.tensor([[0, 11, 40], [0, 13, 40], [0, 33, 40]], dtype=torch.int32, device=device)
    found: dict[str, list[Tensor]] = {"experts": [], "replicas": [], "weights": [], "grads": []}
    for number in range(2):
        x = draw_logits(120, 8, seed=number, scale=1.0).to(device).view(3, 40, 8).requires_grad_()
        micro = Micro(offsets, number, 3.0, None if lengths is None else lengths.to(device))
        router.memo = Memo()
        for _ in range(1 + number):
            routing = router(x, micro)
        found["experts"].append(routing.experts)
        found["replicas"].append(routing.experts * 0 if routing.replicas is None else routing.replicas)
        found["weights"].append(routing.weights.detach())
        upstream = torch.linspace(-1, 1, 240, device=device).view(120, 2)
        found["grads"] += torch.autograd.grad(routing.weights, [x, router.gate.weight], upstream)
    found["statistics"] = [buffer.clone() for buffer in router.buffers()]
    return found
