"""Experts: every backend that is there against the twin, and the choice between them."""

import logging
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor

from kernels.expert_ffn import Backend, choose_backend, expert_ffn, expert_ffn_by, has_quack
from kernels.optional import announce
from kernels.reference import expert_ffn as expert_ffn_by_expert
from parallel.gradients import Gradients
from tests.support.kernel_checks import (
    DEVICE,
    DTYPES,
    allowed_errors,
    check_against_twin,
    errors,
    random_tensor,
)

ON_HOPPER = DEVICE.type == "cuda" and torch.cuda.get_device_capability()[0] == 9
BACKENDS = [Backend.torch, *([Backend.quack] if ON_HOPPER and has_quack() else [])]
ENDS = {
    "some without rows": [0, 40, 40, 101, 101],
    "all rows on the first": [100] * 5,
    "all rows on the last": [0, 0, 0, 0, 100],
    "one row each": list(range(1, 65)),
    "no rows": [0] * 5,
}
if DEVICE.type == "cuda":
    ENDS["more than a tile, and hardly any"] = [1, 1900, 1900, 4999, 5000]
    ENDS["8191 rows"] = [100, 600, 4000, 8128, 8191]


def draw(ends: list[int], hidden: int, ffn: int) -> list[Tensor]:
    """x, gate_up, down, scale, ends."""
    experts, rows = len(ends), ends[-1]
    return [
        random_tensor(rows, hidden, seed=1),
        random_tensor(experts, 2, ffn, hidden, seed=2, scale=hidden**-0.5),
        random_tensor(experts, hidden, ffn, seed=3, scale=ffn**-0.5),
        random_tensor(rows, seed=4).float().sigmoid(),
        torch.tensor(ends, dtype=torch.int32, device=DEVICE),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("sizes", [(16, 24), (64, 200), (256, 96)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_paths_against_the_twin(
    backend: Backend, sizes: tuple[int, int], ends: list[int], dtype: torch.dtype
) -> None:
    """Experts without rows have zero gradients; the weights of rows get theirs."""
    if backend is Backend.quack and dtype == torch.float32:
        pytest.skip("quack takes bf16 and fp16")
    check_against_twin(partial(expert_ffn_by, backend), expert_ffn_by_expert, draw(ends, *sizes), dtype=dtype)


@pytest.mark.skipif(Backend.quack not in BACKENDS, reason="quack adds in its GEMMs")
@pytest.mark.parametrize("ends", [ends for ends in ENDS.values() if ends[-1]])
def test_weight_gradients_are_added_to_those_of_the_masters(ends: list[int]) -> None:
    """Three passes: their sum in fp32 errs at most twice as much as the twin's rounded ones; it repeats."""
    inputs = draw(ends, 256, 96)
    narrow = [x.bfloat16() if x.dtype == torch.float64 else x for x in inputs]
    weights = [x.requires_grad_() for x in narrow[1:3]]
    upstream = [random_tensor(ends[-1], 256, seed=seed).bfloat16() for seed in (5, 6, 7)]

    def add_up() -> list[Tensor]:
        masters = [x.detach().float() for x in weights]
        buffers = [partial(Gradients.buffer, master) for master in masters]
        for grad in upstream:
            expert_ffn_by(Backend.quack, *narrow, master_grads=tuple(buffers)).backward(grad)
        assert all(weight.grad is None for weight in weights)
        return [master.grad for master in masters]

    def reference(leaves: list[Tensor], *, rounds: bool) -> list[Tensor]:
        y = expert_ffn_by_expert(*leaves)
        parts = [torch.autograd.grad(y, leaves[1:3], g.to(y.dtype), retain_graph=True) for g in upstream]
        return [sum(x.float() if rounds else x for x in each) for each in zip(*parts, strict=True)]

    wide = [x.detach().double() if x.is_floating_point() else x for x in narrow]
    for x in wide[1:3]:
        x.requires_grad_()
    found, again = add_up(), add_up()
    plain, truth = reference(narrow, rounds=True), reference(wide, rounds=False)
    for mine, repeated, theirs, right in zip(found, again, plain, truth, strict=True):
        assert torch.equal(mine, repeated)
        assert mine.isfinite().all()
        bounds = allowed_errors(errors(theirs, right), mine.dtype)
        assert all(a <= b for a, b in zip(errors(mine, right), bounds, strict=True))


@pytest.mark.skipif(Backend.quack not in BACKENDS, reason="20 GB of memory")
@pytest.mark.parametrize(
    ("experts", "hidden", "ffn", "rows"), [(2, 64, 9216, 2**31 // (2 * 9216) + 100), (32, 6144, 9216, 96)]
)
def test_past_2_to_the_31_entries(experts: int, hidden: int, ffn: int, rows: int) -> None:
    """The last expert's few rows, of many rows or of many weights, against the same alone."""
    last = 50
    x = torch.zeros(rows, hidden, dtype=torch.bfloat16, device=DEVICE)
    gate_up = torch.zeros(experts, 2, ffn, hidden, dtype=torch.bfloat16, device=DEVICE)
    down = torch.zeros(experts, hidden, ffn, dtype=torch.bfloat16, device=DEVICE)
    assert max(rows * 2 * ffn, gate_up.numel()) > 2**31
    x[-last:] = random_tensor(last, hidden, seed=1, dtype=torch.bfloat16)
    gate_up[-1] = random_tensor(2, ffn, hidden, seed=2, dtype=torch.bfloat16, scale=hidden**-0.5)
    down[-1] = random_tensor(hidden, ffn, seed=3, dtype=torch.bfloat16, scale=ffn**-0.5)
    scale = random_tensor(rows, seed=4, dtype=torch.float32)
    ends = torch.tensor([rows - last] * (experts - 1) + [rows], dtype=torch.int32, device=DEVICE)
    found = []
    for pieces in (
        (x, gate_up, down, scale, ends),
        (x[-last:], gate_up[-1:], down[-1:], scale[-last:], ends[-1:] - rows + last),
    ):
        leaves = [piece.detach().requires_grad_() for piece in pieces[:4]]
        y = expert_ffn_by(Backend.quack, *leaves, pieces[4])
        d_x, d_gate_up, d_down, d_scale = torch.autograd.grad(y, leaves, torch.ones_like(y))
        found.append([y[-last:], d_x[-last:], d_gate_up[-1], d_down[-1], d_scale[-last:]])
    for mine, right in zip(*found, strict=True):
        assert right.any()
        assert torch.equal(mine, right)


def test_the_fastest_path_is_taken_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    announce.cache_clear()
    inputs = [x.bfloat16() if x.dtype == torch.float64 else x for x in draw([3, 3, 8], 16, 24)]
    with caplog.at_level(logging.INFO):
        first, second = expert_ffn(*inputs), expert_ffn(*inputs)
    assert torch.equal(first, second)
    assert torch.equal(first, expert_ffn_by(BACKENDS[-1], *inputs))
    assert [record.message.split(":")[0] for record in caplog.records] == [f"experts by {BACKENDS[-1]}"]


@pytest.mark.parametrize(
    ("given", "backend", "reason"),
    [
        ({}, Backend.quack, "is installed"),
        ({"has_quack": False}, Backend.torch, "no quack-kernels that works"),
        ({"capability": None}, Backend.torch, "not on a GPU"),
        ({"capability": (8, 0)}, Backend.torch, "(8, 0)"),
        ({"capability": (10, 0)}, Backend.torch, "(10, 0)"),
        ({"dtype": torch.float32}, Backend.torch, "float32"),
        ({"ffn": 100}, Backend.torch, "expert_ffn_size 100"),
        ({"hidden": 60}, Backend.torch, "hidden_size 60"),
    ],
)
def test_choice(given: dict, backend: Backend, reason: str) -> None:
    best = {"dtype": torch.bfloat16, "hidden": 64, "ffn": 96, "capability": (9, 0), "has_quack": True}
    named = {**best, **given}
    found, why = choose_backend(**{**named, "has_quack": partial(bool, named["has_quack"])})
    assert found is backend
    assert reason in why


@pytest.mark.parametrize("given", [{"capability": (10, 0)}, {"dtype": torch.float32}, {"ffn": 100}])
def test_quack_is_not_tried_where_it_could_not_serve(given: dict) -> None:
    best = {"dtype": torch.bfloat16, "hidden": 64, "ffn": 96, "capability": (9, 0)}
    asked = mock.Mock(return_value=True)
    assert choose_backend(**{**best, **given}, has_quack=asked)[0] is Backend.torch
    asked.assert_not_called()
    assert choose_backend(**best, has_quack=asked)[0] is Backend.quack
