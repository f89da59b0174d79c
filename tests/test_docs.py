"""Every ```bash block of README.md and docs/ is run, in order, in one copy of the repository.

HTML comments on the lines before a block say what is special about it: `needs: WHAT`, one of NEEDS, and it is
not run, but what it gives train/pretrain.py is checked; `exit: CODE`, it ends so; `before: COMMAND`, a quick
stand-in for what the reader has by then; `with: WORD ARGUMENTS`, the commands that hold the word are run with
these at their end, which makes long ones short. A block that an earlier document has, too, is run there.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from scripts.curriculum import read_config
from tests.support.clone import ROOT, clone_repository
from train.config import ConfigError
from train.curriculum_stages import build_stages, validate_stages

NEEDS = {"gpu", "network", "slurm"}
DOCUMENTS = [ROOT / "README.md", ROOT / "docs/guides/getting-started.md"]  # what the others begin with
DOCUMENTS += sorted(set((ROOT / "docs").rglob("*.md")) - set(DOCUMENTS))
PAGES = [*DOCUMENTS, ROOT / "CONTRIBUTING.md"]
TOP = "(?:conf|data|docs|kernels|model|parallel|requirements|scripts|tests|train)"
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
UNESCAPED_BAR = re.compile(r"(?<!\\)\|")
BLOCK = re.compile(r"((?:^<!-- \w+: [^\n]* -->\n)*)^```(\w*)\n(.*?)^```$", re.M | re.S)
COMMENT = re.compile(r"<!-- (\w+): (.*) -->")
REMARK = re.compile(r"\s+# .*")


class Block(NamedTuple):
    """A fenced block, and the keys and values of its comments."""

    language: str
    line: int
    comments: list[tuple[str, str]]
    commands: str

    def of(self, key: str) -> list[str]:
        """The values of a key."""
        return [value for name, value in self.comments if name == key]


def blocks(text: str) -> list[Block]:
    return [
        Block(match[2], text[: match.start(3)].count("\n") + 1, COMMENT.findall(match[1]), match[3])
        for match in BLOCK.finditer(text)
    ]


def script(block: Block) -> str:
    """What is run: the block's commands behind those of `before`, with the arguments of `with`."""
    text = block.commands
    for value in block.of("with"):
        word, more = value.split(" ", 1)
        lines = [
            REMARK.sub("", line) if word in line else line for line in text.replace("\\\n", "").split("\n")
        ]
        assert any(word in line for line in lines), f"no command holds {word}"
        text = "\n".join(f"{line} {more}" if word in line else line for line in lines)
    return "\n".join([*block.of("before"), text])


def run(block: Block, folder: Path, name: str) -> None:
    environment = {**os.environ, "PATH": f"{folder}/.venv/bin:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script(block)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    expected = int((block.of("exit") or ["0"])[0])
    said = result.stdout[-3000:] + result.stderr[-3000:]
    assert result.returncode == expected, f"{name}:{block.line}: exit code {result.returncode}\n{said}"


def check(block: Block) -> None:
    """Parse a block; compose the configurations of the runs that it would start, and check their layouts.

    Raises:
        ConfigError: one is not what a run takes.
    """
    parsed = subprocess.run(["bash", "-n", "-c", block.commands], capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr
    for key, value in block.comments:
        assert key in ("exit", "before", "with") or (key == "needs" and value in NEEDS), f"{key}: {value}"
    if not block.of("needs"):
        return
    for line in block.commands.replace("\\\n", "").split("\n"):
        start, found, given = REMARK.sub("", line).partition("train/pretrain.py ")
        if not found:
            start, found, given = REMARK.sub("", line).partition("scripts/slurm/pretrain.sbatch ")
        if found:
            counts = re.findall(r"--(?:nproc-per-node|nodes|gpus-per-node)[ =](\d+)", start)
            world = 1
            for count in counts:
                world *= int(count)
            arguments = [word for word in shlex.split(given) if not word.endswith("=...")]
            validate_stages(build_stages(read_config(arguments)), world)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clone_repository(tmp_path_factory.mktemp("docs") / "clone")


@pytest.fixture(scope="module")
def ran() -> set[str]:
    """Commands of the blocks that have been run in `folder`."""
    return set()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_run(document: Path, folder: Path, ran: set[str]) -> None:
    for block in blocks(document.read_text(encoding="utf-8")):
        if block.language == "bash":
            try:
                check(block)
            except (AssertionError, ConfigError) as error:
                pytest.fail(f"{document.name}:{block.line}: {error}")
            if not block.of("needs") and block.commands not in ran:
                run(block, folder, document.name)
                ran.add(block.commands)


def test_blocks_are_found_with_their_comments() -> None:
    text = "a\n```bash\nx\n```\n<!-- needs: gpu -->\n```bash\ny\nz\n```\n"
    text += "```\nno\n```\n<!-- exit: 2 -->\n<!-- with: w 1 2 -->\n```bash\nw\n```\n"
    assert blocks(text) == [
        Block("bash", 3, [], "x\n"), Block("bash", 7, [("needs", "gpu")], "y\nz\n"),
        Block("", 11, [], "no\n"), Block("bash", 16, [("exit", "2"), ("with", "w 1 2")], "w\n"),
    ]  # fmt: skip


def test_no_command_stands_in_a_block_that_is_not_run() -> None:
    """A fenced block without a language holds output, trees or tables."""
    for document in DOCUMENTS:
        for block in blocks(document.read_text(encoding="utf-8")):
            commands = re.findall(r"^(?:\S*/)?(?:python|torchrun|make|sbatch|pip) .*", block.commands, re.M)
            assert block.language or not commands, f"{document.name}: ```bash is missing: {commands[0]}"


def test_links_and_tables_of_every_page() -> None:
    """What `mkdocs build --strict` does not see: links out of docs/, and tables too wide to read."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        prose = FENCED.sub("", text)
        for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)", prose):
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name}: no {target}"
            if anchor:
                assert anchor in anchors(path.read_text(encoding="utf-8")), f"{page.name}: {target}#{anchor}"
        for line in prose.splitlines():
            assert not line.startswith("|") or len(UNESCAPED_BAR.split(line)) <= 7, f"{page.name}: {line}"


def anchors(text: str) -> set[str]:
    """What headings become in a link."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_paths_in_backticks_exist() -> None:
    for page in PAGES:
        prose = FENCED.sub("", page.read_text(encoding="utf-8"))
        for name in re.findall(rf"`({TOP}/[\w./-]+)(?:::\w+)?`", prose):
            assert "NAME" in name or (ROOT / name).exists(), f"{page.name}: no {name}"


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_bytes()
    assert len(text) <= 9 * 1024
    assert text.count(b"\n") <= 130


def test_the_site_builds(tmp_path: Path) -> None:
    """A missing page, or a link or anchor that leads nowhere, is an error. Nothing is loaded from outside."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert {page.relative_to(tmp_path).with_suffix(".md") for page in pages} >= {
        page.relative_to(ROOT / "docs") for page in PAGES if page.is_relative_to(ROOT / "docs")
    }
    for page in pages:
        loaded = re.findall(
            r"<(?:script|img|link rel=\"stylesheet\")[^>]*\bhttps?://", page.read_text("utf-8")
        )
        assert not loaded, f"{page.name}: {loaded}"


@pytest.mark.parametrize(
    ("commands", "comments", "is_good"),
    [("true", [], True), ("false\ntrue", [], False), ("exit 2", [("exit", "2")], True),
     ("exit 1", [("exit", "2")], False), ("test -e made", [("before", "touch made")], True),
     ("test a  # remark\nmkdir \\\n  b # remark", [("with", "test = a"), ("with", "mkdir -p c/d")], True)],
)  # fmt: skip
def test_a_failing_command_is_noticed(
    commands: str, comments: list[tuple[str, str]], is_good: bool, tmp_path: Path
) -> None:
    block = Block("bash", 1, comments, commands)
    if is_good:
        run(block, tmp_path, "x.md")
    else:
        with pytest.raises(AssertionError, match=r"x\.md:1: exit code"):
            run(block, tmp_path, "x.md")


@pytest.mark.parametrize(
    ("commands", "reason"),
    [("torchrun --nproc-per-node 8 train/pretrain.py conf=debug parallel.ep=3  # x", "parallel.ep=3"),
     ("sbatch --nodes=2 \\\n --gpus-per-node=4 scripts/slurm/pretrain.sbatch conf=debug parallel.tp=9", "=9"),
     ("python train/pretrain.py conf=debug optimiser.lr=1", "optimiser")],
)  # fmt: skip
def test_runs_that_need_a_gpu_are_checked(commands: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check(Block("bash", 1, [("needs", "gpu")], commands))
