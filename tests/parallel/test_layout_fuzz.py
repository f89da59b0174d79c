"""The layout contract on random layouts of random models: `pytest -k layout_fuzz --layouts 100`."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import product

import pytest

from model.config import (
    AuxNormalisation,
    AuxScope,
    Balancing,
    LayerType,
    ModelConfig,
    Renormalise,
    RouterConfig,
    Scope,
)
from parallel.config import ParallelConfig, Schedule, num_stages
from tests.support.layout_cases import (
    NEAR_TIE,
    Case,
    Reference,
    differences,
    explain_failures,
    reference,
    run_cases,
)
from train.config import ConfigError

WORLDS = (2, 3, 4, 6, 8)
TARGETS = {
    **{axis: 0.42 for axis in ("pp", "dp", "cp", "tp", "ep", "etp", "edp")},
    **{f"world {n}": share for n, share in zip(WORLDS, (0.06, 0.06, 0.18, 0.2, 0.45), strict=True)},
    **{str(schedule): 0.09 for schedule in Schedule},
    **{f"zero {stage}": 0.28 for stage in (1, 2, 3)},
    "three axes": 0.65,
}
"""Share of the cases that should have a feature."""
LEAST = {
    **{axis: 1 / 3 for axis in ("pp", "dp", "cp", "tp", "ep", "etp", "edp")},
    **{str(schedule): 0.05 for schedule in Schedule},
    **{f"zero {stage}": 0.05 for stage in (1, 2, 3)},
    "world 8": 1 / 3,
    "three axes": 0.5,
}
"""Below these shares a sample proves too little."""
REDRAWN: dict[str, Counter[int]] = {"near ties": Counter(), "unstable": Counter()}
"""Cases drawn again by reason and world size."""
RAN: Counter[int] = Counter()
"""Cases by world size."""
ROUTED: Counter[str] = Counter()
"""Cases by routing feature."""
LEAST_ROUTED = {"drops": 0.5, "pools": 0.15, "scope local": 0.1, "overlap": 0.6, "padding": 0.25}
"""Below these shares a sample proves too little."""


def features(case: Case) -> list[str]:
    """What the sample is balanced by."""
    cfg, world = case.parallel, case.world_size
    degrees = {axis: getattr(cfg, axis) for axis in ("pp", "cp", "tp", "ep", "etp")}
    degrees |= {"dp": case.dp, "edp": cfg.edp(world)}
    found = [axis for axis, degree in degrees.items() if degree > 1]
    found += ["three axes"] if len(found) >= 3 else []
    found += [str(cfg.schedule)] if cfg.pp > 1 else []
    return [*found, f"world {world}", f"zero {cfg.zero_stage}"]


def routing(case: Case, rng: random.Random) -> Case:
    """The case with a random router; dropless in a quarter of the cases."""
    factor = rng.choice([None, 0.3, 0.7, 1.0, 1.25, 2.0, 1.0, 0.7])
    edp = case.parallel.edp(case.world_size)
    scope = rng.choice([Scope["global"], Scope["global"], Scope["local"]])
    divisors = [n for n in range(1, edp + 1) if edp % n == 0]
    is_whole = scope is Scope["local"] or rng.random() < 0.7
    router = RouterConfig(
        capacity_factor=factor,
        scope=scope,
        pool_groups=None if is_whole else rng.choice(divisors),
        renormalise=rng.choice(list(Renormalise)),
        aux_loss_coefficient=0.1,
        aux_scope=rng.choice(list(AuxScope)),
        aux_normalisation=rng.choice(list(AuxNormalisation)),
        z_loss_coefficient=rng.choice([0.0, 0.01]),
        balancing=rng.choice([*Balancing, Balancing.aux_loss]),
        bias_update_rate=0.01,
        jitter=rng.choice([0.0, 0.0, 0.1]),
        force=rng.choice(["none", "none", "none", "balanced", "skewed:1.2"]),
    )
    return replace(case, router=router, overlap_groups=rng.randint(1, 4), is_padded=rng.random() < 0.4)


def routing_features(case: Case, truth: Reference) -> list[str]:
    """What a sample must not lack."""
    found = ["drops"] if truth.dropped else []
    if case.router.capacity_factor is not None:
        found.append("pools" if case.pool_groups > 1 else f"scope {case.router.scope}")
    found += ["overlap"] if case.overlap_groups > 1 else []
    return [*found, *(["padding"] if case.is_padded else [])]


def is_legal(case: Case) -> bool:
    """The program's own verdict."""
    try:
        case.run_config().validate(case.world_size)
    except ConfigError:
        return False
    return True


@cache
def legal_layouts(world: int) -> list[Case]:
    """Every layout of a world size that some model allows, with a model so large that it does."""
    model = ModelConfig(
        num_layers=16, hidden_size=48, num_heads=48, num_kv_heads=48, head_dim=2, rotary_dim=2,
        vocab_size=48, num_experts=48, expert_ffn_size=48,
    )  # fmt: skip
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    found = []
    for pp, cp, tp, ep, etp in product(divisors, repeat=5):
        if world % (pp * cp * tp) or world % (pp * ep * etp):
            continue
        for schedule, stage in product(Schedule if pp > 1 else [Schedule["1f1b"]], (1, 2, 3)):
            cfg = ParallelConfig(pp=pp, cp=cp, tp=tp, ep=ep, etp=etp, schedule=schedule, zero_stage=stage)
            sizes = {"row_tokens": 192, "micro_rows": 1, "num_micro": 24}
            case = Case(parallel=cfg, dp=cfg.dp(world), model=model, **sizes)
            found += [case] if is_legal(case) else []
    return found


def layouts(seed: int) -> Iterator[Case]:
    """Endless layouts; each is, of 40 random ones, the one whose features are scarcest so far."""
    rng = random.Random(f"layouts {seed}")
    counts: Counter[str] = Counter()
    number = 0
    while True:
        number += 1
        candidates = [rng.choice(legal_layouts(rng.choice(WORLDS))) for _ in range(40)]
        wanted = {feature: max(0.0, share * number - counts[feature]) for feature, share in TARGETS.items()}
        chosen = max(candidates, key=lambda case: sum(wanted[feature] for feature in features(case)))
        counts.update(features(chosen))
        yield chosen


def sizes(layout: Case, rng: random.Random) -> Case:
    """The layout with a random tiny model and batch that fit."""
    cfg = layout.parallel
    stages = num_stages(cfg.schedule, cfg.pp)
    while True:
        layers = max(stages, rng.randint(1, 3)) + (stages < 4 and rng.randint(0, 1))
        heads = cfg.tp * rng.randint(1, max(1, 6 // cfg.tp))
        head_dim, experts = rng.choice([2, 4, 5, 6, 8]), cfg.ep * rng.randint(1, max(2, 6 // cfg.ep))
        if experts < 2:
            continue
        model = ModelConfig(
            num_layers=layers,
            hidden_size=rng.choice([8, 10, 12, 15, 16, 18, 20, 24]),
            num_heads=heads,
            num_kv_heads=rng.choice([n for n in range(1, heads + 1) if heads % n == 0]),
            head_dim=head_dim,
            rotary_dim=rng.choice(range(2, head_dim + 1, 2)),
            vocab_size=cfg.tp * rng.randint(4, 20),
            num_experts=experts,
            experts_per_token=rng.randint(1, min(3, experts)),
            expert_ffn_size=cfg.etp * rng.choice([3, 4, 8, 12]),
            softmax_every=rng.randint(1, 3),
            layer_types=rng.choice([None, rng.choices(list(LayerType), k=layers)]),
        )
        unit = cfg.tp * cfg.cp * (2 if cfg.cp > 1 else 1)
        case = replace(
            layout,
            model=model,
            row_tokens=unit * rng.randint(1, max(1, 40 // unit)),
            micro_rows=rng.randint(1, 2 if layout.dp <= 2 else 1),
            num_micro=rng.choice([1, 2, 3, cfg.pp, cfg.pp + 1, 2 * cfg.pp]),
        )
        case = routing(case, rng)
        if case.row_tokens > 3 and is_legal(case):
            return replace(case, seed=rng.randrange(10**6))


def is_unstable(case: Case, truth: Reference) -> bool:
    """Whether one process strays from itself, near the tolerances, if its weights move by round-off.

    With one head and few tokens, the lightning layers' output norm divides by almost nothing.
    """
    twin = reference(case, jolt=2**-24)
    for step, full in enumerate(truth.gradients):
        shifts = (twin.losses[step] / truth.losses[step], (twin.squares[step] / truth.squares[step]) ** 0.5)
        floor = 1e-3 * max(grad.abs().max() for grad in full.values())
        errors = [
            (twin.gradients[step][k] - g).abs().max() / max(g.abs().max(), floor) for k, g in full.items()
        ]
        if max(abs(shift - 1) for shift in shifts) > 2e-6 or max(errors) > 5e-5:
            return True
    return False


def draw(seed: int, number: int, layout: Case) -> tuple[Case, Reference]:
    """The case of this number and its truth; where round-off decides, it is drawn again."""
    rng = random.Random(f"sizes {seed} {number}")
    while True:
        case = sizes(layout, rng)
        truth = reference(case)
        if truth.gap < NEAR_TIE:
            REDRAWN["near ties"][case.world_size] += 1
        elif is_unstable(case, truth):
            REDRAWN["unstable"][case.world_size] += 1
        else:
            return case, truth


def chosen_layouts(config: pytest.Config) -> dict[int, Case]:
    """Layouts of this session by case number."""
    only, count = config.getoption("layout_case"), config.getoption("layouts")
    drawn = layouts(config.getoption("layout_seed"))
    if only is None:
        return {number: next(drawn) for number in range(count)}
    return {only: [next(drawn) for _ in range(only + 1)][-1]}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a world size that occurs."""
    if "world" in metafunc.fixturenames:
        present = {case.world_size for case in chosen_layouts(metafunc.config).values()}
        metafunc.parametrize("world", sorted(present))


def test_layout_fuzz_sample(
    pytestconfig: pytest.Config, record_property: Callable[[str, object], None]
) -> None:
    """Every axis, schedule and ZeRO stage has its share of the cases."""
    chosen = chosen_layouts(pytestconfig)
    counts = Counter(feature for case in chosen.values() for feature in features(case))
    record_property(
        "layouts",
        f"{len(chosen)} layouts: " + ", ".join(f"{name} {counts[name]}" for name in TARGETS),
    )
    scarce = {name: counts[name] for name, share in LEAST.items() if counts[name] < share * len(chosen)}
    assert not scarce or len(chosen) < 50, scarce


@pytest.mark.timeout(0)  # the harness ends cases that hang
def test_layout_fuzz(
    world: int, pytestconfig: pytest.Config, record_property: Callable[[str, object], None]
) -> None:
    seed = pytestconfig.getoption("layout_seed")
    mine = {n: case for n, case in chosen_layouts(pytestconfig).items() if case.world_size == world}
    drawn = {str(number): draw(seed, number, layout) for number, layout in mine.items()}
    cases = list(drawn.values())
    outcome = run_cases(world, list(drawn), lambda i: differences(*cases[i]))
    times = outcome.seconds or {"none": 0.0}
    slowest = max(times, key=lambda name: times[name])
    RAN[world] = len(cases)
    ROUTED.update(feature for case in cases for feature in routing_features(*case))
    redrawn = ", ".join(f"{counts[world]} {reason}" for reason, counts in REDRAWN.items())
    record_property(
        "layouts",
        f"world {world}: {len(cases)} cases, {len(outcome.failures)} failed, redrawn: {redrawn}; "
        f"{sum(times.values()):.0f} s, slowest {times[slowest]:.1f} s (case {slowest})",
    )
    for name in outcome.failures:
        case = drawn[name][0]
        again = f"reproduce: pytest -k layout_fuzz --layout-seed {seed} --layout-case {name}"
        outcome.failures[name][:0] = [f"layout {case.layout}", str(case), again]
    assert not outcome.failures, "\n" + explain_failures(outcome)


def test_layout_fuzz_redraws(record_property: Callable[[str, object], None]) -> None:
    """Few cases are drawn again: a sample that leaves out what is hard would prove nothing."""
    record_property(
        "layouts", "routing: " + ", ".join(f"{name} {count}" for name, count in sorted(ROUTED.items()))
    )
    scarce = {
        name: ROUTED[name] for name, share in LEAST_ROUTED.items() if ROUTED[name] < share * RAN.total()
    }
    assert not scarce or RAN.total() < 50, scarce
    redrawn, ran = sum(counts.total() for counts in REDRAWN.values()), RAN.total()
    assert redrawn <= 0.1 * ran or ran < 50, f"{redrawn} of {ran} cases redrawn: {REDRAWN}"
