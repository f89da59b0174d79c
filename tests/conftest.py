"""What all tests share: threads, and a corpus that is the same on every machine."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is decorated: before anything imports one

from data.dataset import DatasetWriter
from data.tokenizer import eos_id, train_tokenizer

ROOT = Path(__file__).resolve().parents[1]

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = (
    "1"  # of the processes that tests start: bit-equal sums need equal thread counts
)
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def license_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PREFIX of the paragraphs of LICENSE, a text that never changes: 33 documents, vocabulary 512."""
    texts = [part for part in (ROOT / "LICENSE").read_text(encoding="utf-8").split("\n\n") if part.strip()]
    tokenizer = train_tokenizer(texts, size=512)
    end = eos_id(tokenizer)
    prefix = tmp_path_factory.mktemp("corpus") / "license"
    with DatasetWriter(prefix, vocab_size=512, eos_id=end, source="LICENSE") as writer:
        for text in texts:
            writer.add(np.array([*tokenizer.encode(text).ids, end]))
    return prefix


LONG = [
    "tests/parallel/test_layouts.py",
    "tests/train/test_pretrain.py",
    "tests/train/schedule/test_curriculum.py",
    "tests/test_docs.py",
    "tests/parallel/test_memory.py",
    "tests/parallel/test_layout_fuzz.py",
    "tests/parallel/test_capacity.py",
]
"""Files that take longest: `make test` starts with them, lest it end with one of them alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; else the order stays."""
    files = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: files.get(item.nodeid.partition("::")[0], len(files)))


def pytest_addoption(parser: pytest.Parser) -> None:
    """How many random layouts tests/parallel/test_layout_fuzz.py tries, and which; data of tests/kernels."""
    parser.addoption("--data-seed", type=int, default=0, help="other random data in tests/kernels")
    group = parser.getgroup("layouts")
    group.addoption("--layouts", type=int, default=12, help="random layouts to try")
    group.addoption("--layout-seed", type=int, default=0, help="seed that they are drawn from")
    group.addoption("--layout-case", type=int, default=None, help="try this one of them only")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The random layouts' counts, where they ran."""
    reports = [report for some in terminalreporter.stats.values() for report in some]
    calls = [report for report in reports if getattr(report, "when", None) == "call"]
    lines = [text for report in calls for key, text in report.user_properties if key == "layouts"]
    if lines:
        terminalreporter.section("layout fuzz")
        terminalreporter.write("\n".join([*lines, ""]))
