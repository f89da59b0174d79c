"""The list of a run's stages, and the simulation that compares drawn with configured shares."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from scripts.curriculum import COLUMNS, main, mixture, read_config
from tests.support.programs import simulate_mixture
from train.curriculum_stages import build_stages
from train.schedule.curriculum import CurriculumStageConfig

ROWS = [  # of conf=minimax_text_01, in the order of COLUMNS; a column is cut where two blanks are
    "8k-16m|4,113|1|69B|8Ki|10k|16Mi|4.00e-07 .. 2.00e-04|as it comes|-|8",
    "8k-32m|21,488|4,114|721B|8Ki|10k|32Mi|2.00e-04 .. 2.00e-04|as it comes|-|43",
    "8k-64m|58,264|25,602|3.91T|8Ki|10k|64Mi|2.00e-04 .. 2.00e-04|as it comes|-|116",
    "8k-128m|18,627|83,866|2.5T|8Ki|10k|128Mi|2.00e-04 .. 2.00e-04|as it comes|-|37",
    "8k-lower|23,842|102,493|3.2T|8Ki|10k|128Mi|1.30e-04 .. 1.30e-04|as it comes|-|48",
    "8k-decay|7,451|126,335|1T|8Ki|10k|128Mi|1.30e-04 .. 3.00e-05|as it comes|-|15",
    "128k|2,236|133,786|300.1B|128Ki|5M|128Mi|3.00e-05 .. 3.00e-05|lengths 30/70/0%, over 15B|-|5",
    "512k|239|136,022|32.08B|512Ki|10M|128Mi|3.00e-05 .. 3.00e-05|lengths 35/35/30%, over 1.6B|-|0",
    "1m|194|136,261|26.04B|1Mi|10M|128Mi|3.00e-05 .. 3.00e-05|lengths 30/30/40%, over 1.3B|-|0",
]


def test_stages_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conf=minimax_text_01"]) == 0
    head, *rows = ("|".join(re.split(r"  +", line)) for line in capsys.readouterr().out.splitlines())
    assert head == "|".join(COLUMNS)
    assert rows == ROWS


def test_weights_and_final_weights_are_listed() -> None:
    cfg = read_config(["conf=curriculum_small", "data.sources=[{path: a, weight: 3}, {path: b, weight: 1}]"])
    settings = CurriculumStageConfig(name="s", tokens=8192, final_fraction=0.2, final_weights=[1.0, 2.0])
    (stage,) = build_stages(replace(cfg, curriculum=[settings]))
    assert mixture(stage) == "3:1, last 20% 1:2"


def test_a_shorter_run_lists_what_it_reaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conf=minimax_text_01", "train.steps=4200"]) == 0
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in rows] == [["8k-16m", "4,113"], ["8k-32m", "87"]]


@pytest.mark.parametrize("program", [main, lambda argv: simulate_mixture.main(["x.svg", *argv])])
def test_unknown_conf(program, capsys: pytest.CaptureFixture[str]) -> None:
    assert program(["conf=nope"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: conf=nope: no such run; there are ['curriculum_small', ")


def shares(cell: str) -> list[float]:
    return [float(number) for number in cell.split(" / ")]


def run_simulation(out: Path, *argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[list[str]]]:
    code = simulate_mixture.main([str(out), *argv])
    lines = capsys.readouterr().out.splitlines()
    return code, [line.strip("| ").split(" | ") for line in lines[2:-1]]


@pytest.mark.parametrize(
    ("conf", "scale", "stages"),
    [
        ("curriculum_small", "3e6", ["256", "1024", "4096"]),
        ("minimax_text_01", "1e9", ["8k-decay", "128k", "512k", "1m"]),
    ],
)
def test_drawn_shares_match(
    conf: str, scale: str, stages: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shares.svg"
    code, rows = run_simulation(out, f"conf={conf}", "data.sources=[]", "--scale", scale, capsys=capsys)
    assert code == 0
    assert [row[0] for row in rows] == [name for name in stages for _ in range(2)]
    for _, _, _, configured, drawn, error in rows:
        assert abs(sum(shares(configured)) - 100) < 0.05
        assert abs(sum(shares(drawn)) - 100) < 0.05
        assert max(map(abs, shares(error))) < 1
    root = ElementTree.parse(out).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert out.stat().st_size < 200_000
    texts = ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"web, % of tokens", *stages} <= set(texts)


def test_wrong_shares_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = simulate_mixture.Planner.plan

    def other_lengths(self, row_tokens: int, num_rows: int, asked):
        own = None if asked.length_shares is None else (0.32, 0.38, 0.3)
        return plan(self, row_tokens, num_rows, type(asked)(asked.weights, own))

    monkeypatch.setattr(simulate_mixture.Planner, "plan", other_lengths)
    argv = ("conf=curriculum_small", "--scale", "1e6")
    code, rows = run_simulation(tmp_path / "x.svg", *argv, capsys=capsys)
    assert code == 1
    assert max(map(abs, shares(rows[2][-1]))) > 1


def test_a_run_without_stages_cannot_be_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate_mixture.main([str(tmp_path / "x.svg"), "conf=debug"]) == 2
    assert "has no curriculum" in capsys.readouterr().err
