"""The benchmark of kernels: its floors and table, its cases at tiny sizes, what fails, what it refuses."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from scripts.bench import main
from scripts.benchmarks.cases import DOCUMENTS, Sizes, all_cases
from scripts.benchmarks.kernels import (
    COLUMNS,
    OURS,
    Case,
    Ceilings,
    Op,
    Work,
    _backward,
    _both,
    _forward,
    choose_cases,
    format_cells,
    measure_case,
)

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
TINY = Sizes(
    tokens=256,
    short=64,
    hidden=32,
    heads=4,
    kv_heads=2,
    head_dim=16,
    rotary_dim=8,
    experts=8,
    moe_hidden=32,
    moe_ffn=16,
    ffn=24,
    vocab=50,
    parameters=100,
)
CEILINGS = Ceilings(790, 4.3)
BACKWARD = Work(0, 8.6e9)


class CountingClock:
    """Runs each call once and says 1, 2, 3 ... ms."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, call: Callable[[], object]) -> float:
        call()
        self.calls += 1
        return float(self.calls)


def a_case(ops: dict[str, Op], *, backward: Work | None = BACKWARD, is_joint: bool = False) -> Case:
    return Case("group", "name", Work(7.9e11, 4.3e9), backward, lambda _: ops, is_joint)


def squares(*, fails: bool = False) -> Op:
    x = torch.arange(3.0, requires_grad=True)

    def forward() -> torch.Tensor:
        if fails:
            raise RuntimeError("no room\nfor the details")
        return x.square()

    return Op(forward, [x])


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, cases: list[Case]) -> None:
    """Let the program find a GPU, and these cases."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr("scripts.benchmarks.tables.measure_ceilings", lambda _: CEILINGS)
    monkeypatch.setattr("scripts.benchmarks.tables.median_ms", CountingClock())
    monkeypatch.setattr("scripts.benchmarks.tables.all_cases", lambda _: cases)


def test_floors_of_the_design() -> None:
    """The table of floors at 790 TFLOP/s and 4.3 TB/s."""
    expected = {
        "lightning 64 x 128, 8k": (0.125, 0.218),
        "lightning 64 x 128, 32k": (0.499, 0.874),
        "lightning 64 x 128, 32k in 9 docs": (0.499, 0.874),
        "lightning 8 x 128, 32k": (0.0625, 0.109),
        "softmax 32k in 9 docs, 64/8 heads": (7.42, 18.56),
        "MoE 32 x 2048 x 1408, top-2, 32k": (1.435, 2.87),
        "router 32k x 32, capacity 1.25": (0.001, 0.002),
        "un-permute 32k x 6144, top-2": (0.28, 0.28),
        "linear CE 8k x 6144 x 200064": (76.5, None),
        "RMSNorm 32k x 6144": (0.187, 0.281),
        "add + RMSNorm 32k x 6144": (0.281, 0.375),
        "gated norm 32k x 8192": (0.375, 0.624),
        "SwiGLU 64k x 2 x 9216": (0.843, 1.405),
        "SiLU(qkv) 32k x 24576": (0.749, 1.124),
        "RoPE 32k, 64/8 heads, 64/128": (0.14, 0.14),
        "AdamW, 1e9 fp32": (6.51, None),
        "AdamW + norm, 1e9 fp32": (7.44, None),
    }
    cases = all_cases(CPU)
    assert [case.name for case in cases] == list(expected)
    for case in cases:
        for work, ms in zip((case.forward, case.backward), expected[case.name], strict=True):
            assert (work is None) == (ms is None)
            if work is not None:
                assert CEILINGS.floor_ms(work) == pytest.approx(ms, rel=0.01, abs=6e-4)
    assert sum(DOCUMENTS) == 32768
    assert Ceilings(1, 1000).floor_ms(Work(3e9, 0)) == 3
    assert Ceilings(1000, 1).floor_ms(Work(3e9, 7e9)) == 7


def test_cases_run() -> None:
    """All of ours, forward and backward, by the twins."""
    for case in all_cases(CPU, TINY):
        ops = case.build(False)
        assert list(ops) == [OURS]
        call = _both if case.is_joint else _forward
        call(ops[OURS])()
        if case.backward is not None:
            grads = _backward(ops[OURS])()
            assert len(grads) == len(ops[OURS].wanted)
            assert all(grad.isfinite().all() for grad in grads)


def test_lines() -> None:
    ops = {OURS: squares(), "slow": squares(), "slower": squares()}
    forward, backward = measure_case(a_case(ops), CEILINGS, CountingClock(), with_peers=True)
    assert (forward.passes, forward.ms, forward.peers) == ("forward", 1, {"slow": 3, "slower": 5})
    assert (backward.passes, backward.ms, backward.peers) == ("backward", 2, {"slow": 4, "slower": 6})
    assert forward.cells() == ["name", "forward", "1.000", "1.000", "1.00", "slow", "3.000", "0.33", "-"]
    assert backward.cells() == ["name", "backward", "2.000", "2.000", "1.00", "slow", "4.000", "0.50", "-"]
    (alone,) = measure_case(
        a_case({OURS: squares()}, backward=None), CEILINGS, CountingClock(), with_peers=False
    )
    assert alone.cells()[5:] == ["-"] * 4
    assert len({len(format_cells(cells)) for cells in (list(COLUMNS), forward.cells())}) == 1


def test_peak_of_a_joint_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.benchmarks.kernels.peak_bytes", lambda op: 3 * 2**29)
    x = torch.ones(2, requires_grad=True)
    op = Op(lambda: x.sum(), [x])
    lines = list(
        measure_case(
            a_case({OURS: op}, backward=None, is_joint=True), CEILINGS, CountingClock(), with_peers=False
        )
    )
    assert [(line.passes, line.cells()[-1]) for line in lines] == [("both", "1.50")]


@pytest.mark.parametrize("failing", [OURS, "peer"])
def test_failure_keeps_the_others(failing: str) -> None:
    ops = {name: squares(fails=name == failing) for name in (OURS, "peer")}
    forward, backward = measure_case(a_case(ops), CEILINGS, CountingClock(), with_peers=True)
    assert forward.errors == [f"{failing}: RuntimeError: no room"]
    assert (forward.ms is None) == (failing == OURS)
    assert forward.peers == ({"peer": 1.0} if failing == OURS else {})
    assert forward.cells()[3] == ("failed" if failing == OURS else "1.000")
    assert backward.errors == []

    def unbuildable(with_peers: bool) -> dict[str, Op]:
        raise ImportError("no such peer")

    case = a_case({})._replace(build=unbuildable)
    first, second = measure_case(case, CEILINGS, CountingClock(), with_peers=True)
    assert first.errors == ["ours: ImportError: no such peer"]
    assert second.ms is None


def test_printed_table_file_and_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = a_case({OURS: squares(fails=True)})._replace(group="broken", name="broken one")
    on_a_gpu(monkeypatch, [broken, a_case({OURS: squares()})])
    target = tmp_path / "kernels.json"
    assert main(["kernels", "--json", str(target)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("Some GPU, ")
    assert "product 790 TFLOP/s, copy 4.30 TB/s" in out
    table = [line for line in out.splitlines()[2:] if not line.startswith(" ")]
    assert len({len(line) for line in table}) == 1
    assert len(table[0]) <= 120
    assert "    ours: RuntimeError: no room" in out.splitlines()
    numbers = json.loads(target.read_text())
    assert numbers["ceilings"] == {"tflops": 790, "tb_per_s": 4.3}
    assert [(line["case"], line["ms"]) for line in numbers["lines"]] == [
        ("broken one", None), ("broken one", None), ("name", 1), ("name", 2)
    ]  # fmt: skip
    assert main(["kernels", "--only", "group", "--json", str(target)]) == 0
    assert "broken" not in capsys.readouterr().out
    assert [line["errors"] for line in json.loads(target.read_text())["lines"]] == [[], []]


def test_an_interrupted_run_keeps_its_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(with_peers: bool) -> dict[str, Op]:
        raise KeyboardInterrupt

    on_a_gpu(monkeypatch, [a_case({OURS: squares()}), a_case({})._replace(build=interrupted)])
    target = tmp_path / "kernels.json"
    with pytest.raises(KeyboardInterrupt):
        main(["kernels", "--json", str(target)])
    assert [line["ms"] for line in json.loads(target.read_text())["lines"]] == [1, 2]
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_choice_of_groups() -> None:
    cases = all_cases(CPU)
    assert {case.group for case in choose_cases(cases, ["lightning", "moe"])} == {"lightning", "moe"}
    assert choose_cases(cases, None) == cases


@pytest.mark.parametrize(
    ("arguments", "installed", "message"),
    [
        (["--only", "lightning,fog"], {}, "--only=lightning,fog: 'fog' must be one of ['lightning', "),
        (
            ["--peers"],
            {"fla-core": "0.6.0"},
            "--peers needs liger-kernel==0.8.5, but it is not installed; pip",
        ),
        (["--peers"], {"fla-core": "0.5.1"}, "--peers needs fla-core==0.6.0, but 0.5.1 is; pip install"),
        (["--json", "/no/such/file"], {}, "--json=/no/such/file must name a file in a folder that exists"),
        ([], None, "kernels needs a CUDA device and finds none: times of a CPU would prove nothing"),
    ],
)
def test_refusals(
    arguments: list[str],
    installed: dict[str, str] | None,
    message: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`installed`: packages, None: not even a GPU."""

    def version(name: str) -> str:
        if name not in (installed or {}):
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr("scripts.benchmarks.kernels.version", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: installed is not None)
    monkeypatch.setattr("scripts.benchmarks.tables.all_cases", lambda _: all_cases(CPU))
    assert main(["kernels", *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert len(said.err.splitlines()) == 1
    assert not said.out


def test_peers_are_imported_when_they_are_timed() -> None:
    code = (
        "import sys, scripts.bench; print([name for name in ('fla', 'liger_kernel') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n"
    text = (ROOT / "scripts" / "benchmarks" / "cases.py").read_text()
    assert "import chunk_simple_gla" in text
    assert "\nfrom fla" not in text
    assert "\nfrom liger" not in text
