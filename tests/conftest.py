"""What all tests share: threads, and a corpus that is the same on every machine."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

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
