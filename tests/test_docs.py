"""Every ```bash block of README.md and docs/ is run, the blocks of a document in one copy of the repository.

An HTML comment on the line before a block says what is special about it: `needs: WHAT`, one of NEEDS, and it
is only parsed; `exit: CODE`, it ends so; `before: COMMAND`, a quick stand-in for what the reader has by then.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.clone import ROOT, clone_repository

NEEDS = {"gpu", "network", "slurm", "time"}
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- (\w+): ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """A fenced block; `key` and `value` are the comment's."""

    language: str
    line: int
    key: str
    value: str
    commands: str


def blocks(text: str) -> list[Block]:
    return [
        Block(match[3], text[: match.start(4)].count("\n") + 1, match[1] or "", match[2] or "", match[4])
        for match in BLOCK.finditer(text)
    ]


def run(block: Block, folder: Path, name: str) -> None:
    environment = {**os.environ, "PATH": f"{folder}/.venv/bin:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    commands = f"{block.value}\n{block.commands}" if block.key == "before" else block.commands
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    expected = int(block.value) if block.key == "exit" else 0
    said = result.stdout[-3000:] + result.stderr[-3000:]
    assert result.returncode == expected, f"{name}:{block.line}: exit code {result.returncode}\n{said}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_run(document: Path, tmp_path: Path) -> None:
    found = [block for block in blocks(document.read_text(encoding="utf-8")) if block.language == "bash"]
    for block in found:
        parsed = subprocess.run(["bash", "-n", "-c", block.commands], capture_output=True, text=True)
        assert parsed.returncode == 0, f"{document.name}:{block.line}: {parsed.stderr}"
        is_known = block.key in ("", "exit", "before") or (block.key == "needs" and block.value in NEEDS)
        assert is_known, f"{document.name}:{block.line}: {block.key}: {block.value}"
    runnable = [block for block in found if block.key != "needs"]
    folder = clone_repository(tmp_path / "clone") if runnable else tmp_path
    for block in runnable:
        run(block, folder, document.name)


def test_blocks_are_found_with_their_comments() -> None:
    text = "a\n```bash\nx\n```\n<!-- needs: gpu -->\n```bash\ny\nz\n```\n"
    text += "```\nno\n```\n<!-- exit: 2 -->\n```bash\nw\n```\n"
    assert blocks(text) == [
        Block("bash", 3, "", "", "x\n"), Block("bash", 7, "needs", "gpu", "y\nz\n"),
        Block("", 11, "", "", "no\n"), Block("bash", 15, "exit", "2", "w\n"),
    ]  # fmt: skip


def test_no_command_stands_in_a_block_that_is_not_run() -> None:
    """A fenced block without a language holds output, trees or tables."""
    for document in DOCUMENTS:
        for block in blocks(document.read_text(encoding="utf-8")):
            commands = re.findall(r"^(?:\S*/)?(?:python|torchrun|make|sbatch|pip) .*", block.commands, re.M)
            assert block.language or not commands, f"{document.name}: ```bash is missing: {commands[0]}"


@pytest.mark.parametrize(
    ("commands", "key", "value", "is_good"),
    [("true", "", "", True), ("false\ntrue", "", "", False), ("exit 2", "exit", "2", True),
     ("exit 1", "exit", "2", False), ("test -e made", "before", "touch made", True)],
)  # fmt: skip
def test_a_failing_command_is_noticed(
    commands: str, key: str, value: str, is_good: bool, tmp_path: Path
) -> None:
    block = Block("bash", 1, key, value, commands)
    if is_good:
        run(block, tmp_path, "x.md")
    else:
        with pytest.raises(AssertionError, match=r"x\.md:1: exit code"):
            run(block, tmp_path, "x.md")
