"""The router in one process against plain formulas: losses, balancing, jitter, forced choices, capacity."""

import itertools
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import AuxNormalisation, AuxScope, Balancing, ModelConfig, Renormalise, RouterConfig, Scope
from model.hashing import draw, uniform
from model.moe import MoE
from model.router import Gate, Micro, Router, Routing
from model.transformer import Transformer
from parallel.apply import build_parts, parallelize
from parallel.config import MoEConfig, ParallelConfig, Recompute
from parallel.mesh import one_process
from parallel.recompute import apply_recompute
from tests.support.small_models import initialised

EXPERTS, TOP_K, HIDDEN = 6, 2, 10
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=HIDDEN,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    rotary_dim=2,
    vocab_size=31,
    num_experts=EXPERTS,
    experts_per_token=TOP_K,
    expert_ffn_size=7,
    softmax_every=2,
)
ROWS, TOKENS = 3, 8
ALL = ROWS * TOKENS


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator(torch.get_default_device()).manual_seed(seed), dtype=torch.float64
    )


def build_router(cfg: ModelConfig = MODEL, *, layer: int = 0, seed: int = 0, **options: Any) -> Router:
    """In fp64, its gate so wide that some experts get far more than others."""
    router = Router(cfg, RouterConfig(**options), layer).double()
    router.gate.weight.data = normal(cfg.num_experts, cfg.hidden_size, seed=100)
    router.seed = seed
    return router


def micro_batch(number: int = 0, *, weight: float = 0.0, rows: int = ROWS, tokens: int = TOKENS) -> Micro:
    offsets = torch.tensor([[0, tokens // 2, tokens]] * rows, dtype=torch.int32)
    return Micro(offsets, number, weight)


def counts_of(experts: Tensor, num_experts: int = EXPERTS) -> Tensor:
    return torch.bincount(experts.flatten(), minlength=num_experts)


def plain_probs(router: Router, x: Tensor) -> Tensor:
    return (x.flatten(0, 1) @ router.gate.weight.T).softmax(-1)


def plain_aux(probs: Tensor, counts: Tensor) -> Tensor:
    """E * sum_e f_e P_e."""
    return len(counts) * (counts.double() / counts.sum() * probs.mean(0)).sum()


def balancing_gradients(router: Router, x: Tensor, micro: Micro) -> tuple[Routing, list[Tensor]]:
    """The routing, and the gradients of gate and x where nothing but the balancing losses has one."""
    x = x.clone().requires_grad_()
    routing = router(x, micro)
    grads = torch.autograd.grad(routing.weights, [router.gate.weight, x], torch.zeros_like(routing.weights))
    return routing, list(grads)


def gradients_of(loss: Tensor, router: Router, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [router.gate.weight, x]))


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalisation", list(AuxNormalisation))
@pytest.mark.parametrize("capacity_factor", [None, 0.8])
def test_aux_loss(normalisation: AuxNormalisation, capacity_factor: float | None) -> None:
    """E * sum_e f_e P_e, f counted before any drop; `paper` is 1/E^2 of it."""
    router = build_router(
        aux_normalisation=normalisation, aux_loss_coefficient=0.3, capacity_factor=capacity_factor
    )
    x = normal(ROWS, TOKENS, HIDDEN).requires_grad_()
    routing, grads = balancing_gradients(router, x, micro_batch(weight=0.7))
    probs = plain_probs(router, x)
    aux = plain_aux(probs, counts_of(probs.topk(TOP_K).indices))
    aux = aux / EXPERTS**2 if normalisation is AuxNormalisation.paper else aux
    assert_close(router.losses[0], aux.detach())
    assert_close(grads, gradients_of(0.7 * 0.3 * aux, router, x))
    assert all(grad.abs().max() > 1e-6 for grad in grads)
    assert (capacity_factor is not None) == bool(router.dropped.any())
    assert_close(router.losses[2], -(probs * probs.log()).sum(-1).mean().detach())
    assert_close(routing.weights.sum(-1), torch.ones(ALL, dtype=torch.float64))


@pytest.mark.parametrize(("normalisation", "value"), [("switch", 1.0), ("paper", 1 / 36)])
def test_aux_loss_at_balance(normalisation: str, value: float) -> None:
    """Each token's logits are those of the token before, one expert further."""
    router = build_router(aux_normalisation=AuxNormalisation(normalisation))
    router.gate.weight.data = torch.eye(EXPERTS, HIDDEN, dtype=torch.float64)
    one = F.pad(3 * normal(EXPERTS, seed=3), (0, HIDDEN - EXPERTS))
    rolled = [torch.cat([one[:EXPERTS].roll(shift), one[EXPERTS:]]) for shift in range(EXPERTS)]
    router(torch.stack(rolled)[None], micro_batch(rows=1, tokens=EXPERTS))
    assert router.load.tolist() == [TOP_K] * EXPERTS
    assert router.losses[0].item() == pytest.approx(value, rel=1e-12)


def test_aux_loss_over_the_step_so_far() -> None:
    """global_batch: the third micro-batch's P meets the choices of all three; a new step starts again."""
    router = build_router(aux_scope=AuxScope.global_batch, aux_loss_coefficient=1.0)
    for _ in range(2):
        router.begin_step()
        counts, values = torch.zeros(EXPERTS), torch.zeros((), dtype=torch.float64)
        for number in range(3):
            x = normal(ROWS, TOKENS, HIDDEN, seed=number).requires_grad_()
            _, grads = balancing_gradients(router, x, micro_batch(number, weight=1.0))
            probs = plain_probs(router, x)
            counts = counts + counts_of(probs.topk(TOP_K).indices)
            aux = plain_aux(probs, counts)
            values += aux.detach()
            assert_close(grads, gradients_of(aux, router, x))
            assert_close(router.losses[0], values)
        assert router.step_choices.tolist() == counts.tolist()
    assert router.load.sum() == 2 * 3 * ALL * TOP_K  # goes on until it is read


def test_micro_batch_scope_forgets_the_micro_batch_before() -> None:
    router = build_router(aux_loss_coefficient=1.0)
    x = normal(ROWS, TOKENS, HIDDEN)
    _, first = balancing_gradients(router, x, micro_batch(weight=1.0))
    balancing_gradients(router, normal(ROWS, TOKENS, HIDDEN, seed=1), micro_batch(weight=1.0))
    _, again = balancing_gradients(router, x, micro_batch(weight=1.0))
    assert_close(again, first)


def test_z_loss() -> None:
    """Mean over tokens of log-sum-exp^2."""
    router = build_router(z_loss_coefficient=0.2, aux_loss_coefficient=0.0)
    x = normal(ROWS, TOKENS, HIDDEN).requires_grad_()
    _, grads = balancing_gradients(router, x, micro_batch(weight=0.5))
    z = (x.flatten(0, 1) @ router.gate.weight.T).logsumexp(-1).square().mean()
    assert_close(router.losses[1], z.detach())
    assert_close(grads, gradients_of(0.5 * 0.2 * z, router, x))


def test_evaluation_has_no_balancing_losses() -> None:
    router = build_router(z_loss_coefficient=0.2, capacity_factor=0.5).eval()
    routing, grads = balancing_gradients(router, normal(ROWS, TOKENS, HIDDEN), micro_batch(weight=1.0))
    assert routing.replicas is None
    assert not any(grad.any() for grad in grads)
    assert not any(buffer.any() for buffer in router.buffers())


# Bias-based balancing


def test_bias_changes_the_choice_alone() -> None:
    router = build_router(balancing=Balancing.bias)
    router.bias += torch.tensor([0.9, 0, 0, 0, 0, -2])
    x = normal(ROWS, TOKENS, HIDDEN)
    for part in (router.train(), router.eval()):
        routing = part(x, micro_batch())
        probs = plain_probs(router, x)
        chosen = (probs + router.bias).topk(TOP_K).indices
        assert torch.equal(routing.experts, chosen)
        assert not torch.equal(chosen, probs.topk(TOP_K).indices)
        weights = probs.gather(-1, chosen)
        assert_close(routing.weights, weights / weights.sum(-1, keepdim=True))


def test_bias_replaces_the_aux_loss_but_not_its_record() -> None:
    router = build_router(balancing=Balancing.bias, aux_loss_coefficient=1.0, z_loss_coefficient=0.1)
    x = normal(ROWS, TOKENS, HIDDEN).requires_grad_()
    _, grads = balancing_gradients(router, x, micro_batch(weight=1.0))
    probs = plain_probs(router, x)
    assert_close(router.losses[0], plain_aux(probs, counts_of(probs.topk(TOP_K).indices)).detach())
    z = (x.flatten(0, 1) @ router.gate.weight.T).logsumexp(-1).square().mean()
    assert_close(grads, gradients_of(0.1 * z, router, x))


@pytest.mark.parametrize("balancing", list(Balancing))
def test_a_step_moves_the_bias_towards_balance(balancing: Balancing) -> None:
    router = build_router(balancing=balancing, bias_update_rate=0.25)
    expected = torch.zeros(EXPERTS, dtype=torch.float64)
    for choices in ([9, 3, 6, 6, 5, 7], [0, 0, 0, 0, 0, 6]):
        router.begin_step()
        router.step_choices += torch.tensor(choices)
        router.end_step()
        mean = sum(choices) / EXPERTS
        signs = [(mean > n) - (mean < n) for n in choices]
        expected += 0.25 * torch.tensor(signs) * (balancing is Balancing.bias)
        assert torch.equal(router.bias, expected)


def test_bias_counts_the_whole_step() -> None:
    """All micro-batches of the step, none of the step before."""
    router = build_router(balancing=Balancing.bias, bias_update_rate=0.5)
    for step in range(2):
        router.begin_step()
        before, counts = router.bias.clone(), torch.zeros(EXPERTS)
        for number in range(3):
            x = normal(ROWS, TOKENS, HIDDEN, seed=10 * step + number)
            counts += counts_of(router(x, micro_batch(number)).experts)
        router.end_step()
        assert torch.equal(router.bias - before, 0.5 * (counts.mean() - counts).sign())


def test_bias_levels_a_fixed_skewed_input() -> None:
    router = build_router(balancing=Balancing.bias, bias_update_rate=0.002)
    router.gate.weight.data /= 2
    x = normal(8, 64, HIDDEN)
    x[..., 0] += 1  # some experts' logits rise for all tokens
    violation = []
    for _ in range(200):
        router.begin_step()
        router(x, micro_batch(rows=8, tokens=64))
        router.end_step()
        violation.append((router.step_choices.max() / router.step_choices.double().mean() - 1).item())
    assert violation[0] > 0.5
    assert max(violation[-10:]) < 0.1


# Jitter


def jitter_of(router: Router, micro: Micro, x: Tensor) -> Tensor:
    """The factors that the gate's input was multiplied by."""
    seen: list[Tensor] = []
    hook = router.gate.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    router(x, micro)
    hook.remove()
    return seen[0] / x


def test_jitter_is_a_function_of_place_and_time() -> None:
    x = 1 + normal(ROWS, TOKENS, HIDDEN).abs()
    cases = list(itertools.product(range(3), range(3), range(3)))  # micro-batch, layer, seed

    def factors(number: int, layer: int, seed: int) -> Tensor:
        return jitter_of(build_router(layer=layer, seed=seed, jitter=0.1), micro_batch(number), x)

    found = [factors(*case) for case in cases]
    for case, factor in zip(cases, found, strict=True):
        assert torch.equal(factors(*case), factor)
    for (a, one), (b, other) in itertools.combinations(zip(cases, found, strict=True), 2):
        assert (one - other).abs().mean() > 0.03, f"micro-batch, layer, seed {a} and {b} have the same jitter"
    assert len(found[0].flatten().unique()) == x.numel()


def test_jitter_has_mean_1_and_keeps_its_bounds() -> None:
    x = torch.ones(16, 64, HIDDEN, dtype=torch.float64)
    factors = jitter_of(build_router(jitter=0.2), micro_batch(rows=16, tokens=64), x)
    assert 0.8 <= factors.min() < 0.801
    assert 1.199 < factors.max() <= 1.2
    assert abs(factors.mean() - 1) < 5 * 0.2 / math.sqrt(3 * x.numel())
    assert factors.var().item() == pytest.approx(0.2**2 / 3, rel=0.05)  # uniform


@pytest.mark.parametrize(("jitter", "training"), [(0.0, True), (0.2, False)])
def test_no_jitter(jitter: float, training: bool) -> None:
    x = torch.ones(ROWS, TOKENS, HIDDEN, dtype=torch.float64)
    assert torch.equal(jitter_of(build_router(jitter=jitter).train(training), micro_batch(), x), x)


def test_jitter_reaches_gradients() -> None:
    """The gate's gradient is that at the jittered input, x's is multiplied by the factors."""
    router = build_router(jitter=0.3, aux_loss_coefficient=1.0)
    x = normal(ROWS, TOKENS, HIDDEN).requires_grad_()
    factors = jitter_of(router, micro_batch(), x).detach()
    routing, grads = balancing_gradients(router, x, micro_batch(weight=1.0))
    aux = plain_aux(plain_probs(router, x * factors), counts_of(routing.experts))
    assert_close(grads, gradients_of(aux, router, x))


def test_draws_differ() -> None:
    """Another number, seed, layer or purpose is another draw."""
    values = [
        draw(number, *parts)
        for number in range(5)
        for length in (2, 3)
        for parts in itertools.product(range(5), repeat=length)
    ]
    assert len(set(values)) == len(values)
    assert min(values) >= 0


@pytest.mark.parametrize("bits", [0, -1])
def test_uniform_is_never_0_or_1(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logarithms are finite for all bits that may come."""
    monkeypatch.setattr("model.hashing.mix", lambda x: torch.full_like(x, bits))
    value = uniform(torch.tensor(3), 4)
    assert 0 < value < 1
    assert torch.log(-torch.log(value)).isfinite()


# Forced choices


def forced(force: str, *, number: int = 0, x_seed: int = 0, tokens: int = 1024, **place: int) -> Routing:
    """Of 8 rows to 8 experts."""
    router = build_router(replace(MODEL, num_experts=8), force=force, **place)
    return router(normal(8, tokens, HIDDEN, seed=x_seed), micro_batch(number, rows=8, tokens=tokens))


@pytest.mark.parametrize("layer", [0, 1, 5])
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_forced_balance_is_exact(layer: int, capacity_factor: float | None) -> None:
    cfg = replace(MODEL, num_experts=12, experts_per_token=3)
    router = build_router(cfg, layer=layer, force="balanced", capacity_factor=capacity_factor)
    routing = router(normal(2, 8, HIDDEN), micro_batch(rows=2, tokens=8))
    assert router.load.tolist() == [2 * 8 * 3 // 12] * 12
    assert not router.dropped.any()
    assert all(len(set(choices)) == 3 for choices in routing.experts.tolist())
    other = router(normal(2, 8, HIDDEN, seed=1), micro_batch(rows=2, tokens=8))
    assert torch.equal(routing.experts, other.experts)
    assert not torch.equal(routing.weights, other.weights)


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.5])
def test_forced_skew_follows_zipf(alpha: float) -> None:
    """First choices, and second ones given the first, against 1 / (e + 1)^alpha: chi-square at 0.1 %."""
    experts = forced(f"skewed:{alpha}").experts
    tokens = len(experts)
    p = torch.arange(1, 9, dtype=torch.float64) ** -alpha
    p /= p.sum()
    first = counts_of(experts[:, 0], 8)
    assert ((first - tokens * p).square() / (tokens * p)).sum() < 24.3
    pairs = counts_of(experts[:, 0] * 8 + experts[:, 1], 64).view(8, 8)
    expected = tokens * p[:, None] * p / (1 - p[:, None])
    is_pair = ~torch.eye(8, dtype=torch.bool)
    assert not pairs.diagonal().any()  # choices of a token are distinct
    assert ((pairs - expected).square() / expected)[is_pair].sum() < 93.2
    neighbours = counts_of(experts[::2, 0] * 8 + experts[1::2, 0], 64).view(8, 8)
    expected = tokens / 2 * p[:, None] * p
    assert ((neighbours - expected).square() / expected).sum() < 103.4  # tokens choose independently


def test_forced_skew_is_a_function_of_place_and_time() -> None:
    """Not of the hidden states."""
    base = forced("skewed:1", tokens=32)
    other = forced("skewed:1", tokens=32, x_seed=1)
    assert torch.equal(base.experts, other.experts)
    assert not torch.equal(base.weights, other.weights)
    places = [{}, {"number": 1}, {"layer": 1}, {"seed": 1}]
    found = [forced("skewed:1", tokens=32, **place).experts for place in places]
    for one, another in itertools.combinations(found, 2):
        assert (one == another).double().mean() < 0.6


# Capacity


def plain_moe(moe: MoE, x: Tensor, experts: Tensor, kept: Tensor, renormalise: Renormalise) -> Tensor:
    """Token by token, choice by choice; what was dropped is skipped."""
    probs = plain_probs(moe.router, x)
    rows = []
    for token, hidden in enumerate(x.flatten(0, 1)):
        chosen, is_kept = experts[token].tolist(), kept[token].tolist()
        sharing = [e for e, k in zip(chosen, is_kept, strict=True) if k or renormalise == "before_drop"]
        total = sum(probs[token, e] for e in sharing)
        y = torch.zeros_like(hidden)
        for e in (e for e, k in zip(chosen, is_kept, strict=True) if k):
            gate, up = moe.experts.gate_up[e] @ hidden
            y = y + moe.experts.down[e] @ (F.silu(gate) * up) * probs[token, e] / total
        rows.append(y)
    return torch.stack(rows).view_as(x)


def build_moe(**options: Any) -> MoE:
    moe = MoE(MODEL, RouterConfig(**options), 0).double()
    for number, parameter in enumerate(moe.parameters()):
        parameter.data = normal(*parameter.shape, seed=50 + number)
    return moe


@pytest.mark.parametrize("renormalise", list(Renormalise))
@pytest.mark.parametrize("capacity_factor", [None, 1.0, 0.5, 0.05])
def test_dropped_choices_contribute_nothing(renormalise: Renormalise, capacity_factor: float | None) -> None:
    """Output and all gradients of the layer, and the weights of what is left."""
    moe = build_moe(capacity_factor=capacity_factor, renormalise=renormalise)
    found: list[Routing] = []
    moe.router.register_forward_hook(lambda module, inputs, routing: found.append(routing))
    x, grad = normal(ROWS, TOKENS, HIDDEN).requires_grad_(), normal(ROWS, TOKENS, HIDDEN, seed=1)
    y = moe(x, micro_batch())
    (routing,) = found
    kept = torch.ones(ALL, TOP_K, dtype=torch.bool) if routing.replicas is None else routing.replicas >= 0
    probs = plain_probs(moe.router, x)
    assert torch.equal(routing.experts, probs.topk(TOP_K).indices)

    limit = ALL * TOP_K if capacity_factor is None else math.ceil(capacity_factor * ALL * TOP_K / EXPERTS)
    choices = counts_of(routing.experts)
    assert torch.equal(moe.router.dropped, (choices - limit).clamp(min=0))
    assert torch.equal(moe.router.dropped, counts_of(routing.experts[~kept]))
    assert torch.equal(moe.router.load, choices)
    assert moe.router.moved == 0

    expected = plain_moe(moe, x, routing.experts, kept, renormalise)
    assert_close(y, expected)
    inputs = [x, *moe.parameters()]
    assert_close(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad))

    sums = (routing.weights * kept).sum(-1)
    if renormalise is Renormalise.after_drop:
        assert_close(sums, kept.any(-1).double())
    else:
        weights = probs.gather(-1, routing.experts)
        assert_close(routing.weights, weights / weights.sum(-1, keepdim=True))
    if capacity_factor == 0.05:
        assert not kept.any(-1).all()  # some tokens lost all their choices
        assert not y.flatten(0, 1)[~kept.any(-1)].any()


@pytest.mark.parametrize("renormalise", list(Renormalise))
def test_evaluation_drops_nothing(renormalise: Renormalise) -> None:
    moe = build_moe(capacity_factor=0.05, renormalise=renormalise).eval()
    x = normal(ROWS, TOKENS, HIDDEN)
    experts = plain_probs(moe.router, x).topk(TOP_K).indices
    everything = torch.ones(ALL, TOP_K, dtype=torch.bool)
    assert_close(moe(x, micro_batch()), plain_moe(moe, x, experts, everything, renormalise))
    assert not moe.router.load.any()
    assert not moe.router.dropped.any()


# Recomputation


FEATURES = [
    {},
    {"aux_scope": AuxScope.global_batch},
    {"capacity_factor": 0.7, "renormalise": Renormalise.after_drop, "aux_scope": AuxScope.global_batch},
    {"jitter": 0.3, "z_loss_coefficient": 0.2, "capacity_factor": 0.7},
    {"force": "skewed:1", "jitter": 0.1},
    {"balancing": Balancing.bias, "z_loss_coefficient": 0.1},
]


def train_two(mode: Recompute, options: dict[str, Any], backwards: list[int]) -> tuple[dict, list]:
    """Gradients and statistics of two micro-batches that were both forward before any was backward."""
    model = initialised(MODEL, router=RouterConfig(aux_loss_coefficient=1.0, **options)).double()
    for router in model.routers():
        router.seed = 3
        router.gate.weight.data *= 4
    apply_recompute(model, one_process(torch.device("cpu")).cp, mode)
    losses = []
    for number in range(2):
        tokens = torch.randint(
            31, (ROWS, TOKENS), generator=torch.Generator(torch.get_default_device()).manual_seed(number)
        )
        micro = micro_batch(number)
        numbers = torch.full((ROWS,), number)
        found = model(tokens, micro.offsets, targets=tokens.roll(-1, 1), number=numbers, loss_weight=0.5)
        losses.append(found.mean())
    for number in backwards:
        losses[number].backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return gradients, [buffer for router in model.routers() for buffer in router.buffers()]


@pytest.mark.parametrize("options", FEATURES, ids=str)
@pytest.mark.parametrize("backwards", [[0, 1], [1, 0]], ids=str)
def test_recomputation_changes_nothing(options: dict[str, Any], backwards: list[int]) -> None:
    """Choices, drops, shares and jitter are those of the first pass, and counted once."""
    gradients, statistics = train_two(Recompute.none, options, backwards)
    for mode in (Recompute.full, Recompute.selective):
        again, counted = train_two(mode, options, backwards)
        for name, gradient in gradients.items():
            torch.testing.assert_close(again[name], gradient, rtol=1e-8, atol=1e-10, msg=f"{mode}: {name}")
        assert_close(counted, statistics)


def test_the_gate_keeps_no_wide_copy_of_its_input() -> None:
    """And computes what a linear map of the widened input does, bit for bit."""
    gate, kept = Gate(24, 5), []
    x = torch.randn(2, 7, 24, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(2, 7, 5)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        logits = gate(x)
    assert [(t.dtype, t.shape) for t in kept if t.shape != gate.weight.shape] == [(x.dtype, x.shape)]
    found = [logits, *torch.autograd.grad(logits, [x, gate.weight], grad)]
    logits = F.linear(x.float(), gate.weight)
    expected = [logits, *torch.autograd.grad(logits, [x, gate.weight], grad)]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("mode", [Recompute.full, Recompute.selective])
def test_evaluation_takes_no_decision_over(mode: Recompute) -> None:
    """After training steps with recomputation, a model evaluates as one that never was computed again."""
    tokens = torch.randint(
        31, (ROWS, TOKENS), generator=torch.Generator(torch.get_default_device()).manual_seed(7)
    )
    offsets, results = micro_batch().offsets, []
    for is_first in (True, False):
        model = initialised(MODEL).double()
        apply_recompute(model, one_process(torch.device("cpu")).cp, mode)
        if is_first:
            model(tokens.flip(1), offsets, targets=tokens).sum().backward()
        with torch.no_grad():
            results.append(model.eval()(tokens, offsets, targets=tokens))
    assert torch.equal(*results)


# Precision


def test_router_of_a_bf16_model_is_fp32() -> None:
    mesh, cfg = one_process(torch.get_default_device()), ParallelConfig()
    options = RouterConfig(balancing=Balancing.bias, jitter=0.1, capacity_factor=0.9)
    parts = build_parts(MODEL, cfg, mesh, row_tokens=TOKENS, router=options)
    parallelize(parts, mesh, cfg, dtype=torch.bfloat16, seed=0)
    router = parts[0].routers()[0]
    seen: dict[str, Any] = {}
    router.gate.register_forward_hook(lambda module, inputs, out: seen.update(x=inputs[0], logits=out))
    router.register_forward_hook(lambda module, inputs, out: seen.update(hidden=inputs[0], routing=out))
    parts[0](torch.randint(31, (ROWS, TOKENS)), micro_batch().offsets).sum().backward()
    assert seen["hidden"].dtype == parts[0].blocks["0"].moe.experts.down.dtype == torch.bfloat16
    assert router.gate.weight.dtype == router.bias.dtype == router.losses.dtype == torch.float32
    assert seen["x"].dtype == seen["logits"].dtype == seen["routing"].weights.dtype == torch.float32
    exact = seen["x"].double() @ router.gate.weight.double().T
    torch.testing.assert_close(seen["logits"].double(), exact, rtol=1e-5, atol=1e-6)
    factors = seen["x"] / seen["hidden"].float()
    assert factors[seen["hidden"] != 0].unique().numel() > 0.9 * factors.numel()  # not rounded to bf16


# Configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity_factor": 0.0}, "router.capacity_factor=0.0 must lie in [1e-6, 1e6]; null = dropless"),
        ({"capacity_factor": -1.0}, "router.capacity_factor=-1.0 must lie"),
        ({"capacity_factor": math.inf}, "router.capacity_factor=inf must lie"),
        ({"capacity_factor": math.nan}, "router.capacity_factor=nan must lie"),
        ({"pool_groups": 0}, "router.pool_groups=0 must be at least 1"),
        ({"pool_groups": 2, "scope": Scope["local"]}, "needs router.scope=global"),
        ({"aux_loss_coefficient": -0.1}, "router.aux_loss_coefficient=-0.1 must be"),
        ({"aux_loss_coefficient": math.inf}, "router.aux_loss_coefficient=inf must be"),
        ({"z_loss_coefficient": -1.0}, "router.z_loss_coefficient=-1.0 must be"),
        ({"z_loss_coefficient": math.nan}, "router.z_loss_coefficient=nan must be"),
        ({"bias_update_rate": -1.0}, "router.bias_update_rate=-1.0 must be"),
        ({"jitter": -0.1}, "router.jitter=-0.1 must be >= 0 and below 1"),
        ({"jitter": 1.0}, "router.jitter=1.0 must be"),
        ({"jitter": math.nan}, "router.jitter=nan must be"),
        *(
            ({"force": force}, f"router.force={force} must be none, balanced or skewed:ALPHA")
            for force in ("", "skewed", "skewed:", "skewed:x", "skewed:-1", "skewed:inf", "skewed:nan",
                          "balanced:1", "none:1", "level")
        ),
    ],
    ids=str,
)  # fmt: skip
def test_impossible_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RouterConfig(**options)


@pytest.mark.parametrize("groups", [0, -2])
def test_impossible_overlap_is_refused(groups: int) -> None:
    with pytest.raises(ValueError, match=rf"moe\.overlap_groups={groups} must be at least 1"):
        MoEConfig(overlap_groups=groups)


def test_forms_of_force() -> None:
    assert [RouterConfig(force=force).skew for force in ("none", "balanced", "skewed:0", "skewed:1.5")] == [
        None, None, 0.0, 1.5,
    ]  # fmt: skip


def test_groups_in_a_pool() -> None:
    capacity = {"capacity_factor": 1.0}
    assert [RouterConfig(**capacity).groups_in_pool(edp) for edp in (1, 4)] == [1, 4]
    assert RouterConfig(**capacity, pool_groups=2).groups_in_pool(4) == 2
    assert RouterConfig(**capacity, scope=Scope["local"]).groups_in_pool(4) == 1
    assert RouterConfig().groups_in_pool(4) == 1
    with pytest.raises(ValueError, match=r"router\.pool_groups=3 must divide .* edp=4; use \[1, 2, 4\]"):
        RouterConfig(**capacity, pool_groups=3).groups_in_pool(4)


def test_router_of_a_model_is_the_configured_one() -> None:
    options = RouterConfig(capacity_factor=2.0)
    assert all(router.cfg is options for router in Transformer(MODEL, router=options).routers())
