"""docs/reference/ says what a run writes: every field, every file, every exit code, and none besides.

And where docs/design/ names a function in a file, it stands there.
"""

import ast
import json
import re
from pathlib import Path

import pytest

from tests.support.forked import ROOT, pretrain
from train.guard.signals import EXIT_CODES, Ending
from train.guard.watchdog import HANG_CODE

REFERENCE = ROOT / "docs" / "reference"


def named(text: str) -> str:
    """`x` or **`x`** -> x."""
    return text.strip("*`")


def rows(page: str, heading: str) -> dict[str, list[str]]:
    """The other cells of each row by the name in the first, in the tables of a section and what is below."""
    text = (REFERENCE / page).read_text(encoding="utf-8")
    level = heading.index(" ")
    section = re.split(rf"^#{{1,{level}}} ", text.split(f"\n{heading}\n")[1], flags=re.M)[0]
    lines = [line[1:-1] for line in section.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    return {named(row[0]): row[1:] for row in cells if re.match(r"[*`\d]", row[0])}


@pytest.fixture(scope="module")
def run_dirs(license_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A plain run; and one with what is optional, started twice in the same directory."""
    folder = tmp_path_factory.mktemp("runs")
    given = ["conf=debug", f"data.sources=[{{path: {license_corpus}}}]", "train.steps=2"]
    plain, full = folder / "plain", folder / "full"
    pretrain(*given, f"run_dir={plain}")
    more = ["profile.steps=[1,2]", "tensorboard.mode=files", "eval.every=1", "data.eval_fraction=0.1"]
    for _ in range(2):
        pretrain(*given, *more, "checkpoint.resume=never", f"run_dir={full}")
    return plain, full


@pytest.mark.parametrize("name", ["metrics", "experts"])
def test_every_field_is_described(name: str, run_dirs: tuple[Path, Path]) -> None:
    """And null where it may be: on a CPU, before the window is full."""
    described = rows("metrics.md", f"## `{name}.jsonl`")
    lines = (run_dirs[1] / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        assert record.keys() == described.keys()
        for key, value in record.items():
            if described[key][-1] == "never":
                assert value is not None, key
    assert {len(cells) for cells in described.values()} == {3}


def test_the_files_of_a_run_are_listed(run_dirs: tuple[Path, Path]) -> None:
    listed = rows("run-directory.md", "## Files")
    plain, full = ({path.name + "/" * path.is_dir() for path in folder.iterdir()} for folder in run_dirs)
    assert plain == {
        name for name, (when, _) in listed.items() if when in ("always", "at each start", "at the end")
    }
    assert plain < full <= listed.keys()
    sources = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("train", "scripts")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".sbatch")
    )
    for name in listed.keys() - full - {"wandb/"}:  # wandb's own name for its folder
        assert name in sources, name


def test_the_parts_of_a_checkpoint(run_dirs: tuple[Path, Path]) -> None:
    (folder,) = (run_dirs[0] / "checkpoints").iterdir()
    assert folder.name == "step-2"
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "rank-00000.safetensors"}
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    kinds = {name.partition(".")[0] for name in manifest["tensors"]}
    assert kinds == {"model", "exp_avg", "exp_avg_sq"}


def test_endings_and_exit_codes(run_dirs: tuple[Path, Path]) -> None:
    assert set(rows("run-directory.md", "## Sentinels")) == set(Ending)
    ending = json.loads((run_dirs[0] / "DONE").read_text(encoding="utf-8"))
    assert ending == {"code": 0, "step": 2, "reason": "train.steps reached"}
    assert {int(code) for code in rows("run-directory.md", "## Exit codes")} == exit_codes()


def exit_codes() -> set[int]:
    """Those of endings, of the watchdog, and the numbers with which train/pretrain.py ends a run."""
    tree = ast.parse((ROOT / "train" / "pretrain.py").read_text(encoding="utf-8"))
    ends = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    ends = [call for call in ends if ast.unparse(call.func) in ("fail", "refuse", "os._exit")]
    given = [
        part.value for call in ends for part in ast.walk(call.args[-1]) if isinstance(part, ast.Constant)
    ]
    assert ends
    assert given
    return {HANG_CODE, *EXIT_CODES.values(), *given}


@pytest.mark.parametrize("program", sorted(path.name for path in (ROOT / "scripts").glob("[!_]*.py")))
def test_commands_have_the_options_that_are_listed(program: str) -> None:
    """Required ones are bold."""
    tree = ast.parse((ROOT / "scripts" / program).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    names = [(call, getattr(call.args[0], "value", None)) for call in calls]
    options = {
        name: any(word.arg == "required" for word in call.keywords)
        for call, name in names
        if isinstance(name, str) and re.fullmatch(r"--[a-z-]+", name)
    }
    page = (REFERENCE / "commands.md").read_text(encoding="utf-8")
    section = page.split(f"\n## `scripts/{program}`\n")[1].split("\n## ")[0]
    listed = re.findall(r"^\| (\*\*)?`(--[a-z-]+)`", section, re.M)
    assert {name: bool(bold) for bold, name in listed} == options


def test_targets_of_make_are_listed() -> None:
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert targets
    assert set(rows("commands.md", "## `make`")) == set(targets[1].split())


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "design").glob("*.md")), ids=lambda page: page.name)
def test_names_stand_in_the_files_that_a_page_says(page: Path) -> None:
    """`a` and `b` in `folder/file.py`."""
    text = " ".join(page.read_text(encoding="utf-8").split())
    missing = []
    for names, file in re.findall(r"((?:`\w[\w.]*`(?:, | and )?)+) (?:in|of) `([\w/]+\.py)`", text):
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"\w+(?=[\w.]*`)", names):
            if not re.search(rf"^ *(?:def|class) {name}\b|^{name}\b", source, re.M):
                missing.append(f"{name} in {file}")
    assert not missing
