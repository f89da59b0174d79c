"""Small token datasets for the tests of the data layer."""

from collections.abc import Callable, Sequence
from itertools import count

import numpy as np
import pytest
from hypothesis import settings

from data.dataset import DatasetWriter, TokenDataset

settings.register_profile("longspan", deadline=None, derandomize=True)  # slow machines are not failures
settings.load_profile("longspan")


@pytest.fixture(scope="session")
def make_dataset(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[int]], TokenDataset]:
    """A function that writes documents of the given lengths; no token id occurs twice in a dataset."""
    folder, number = tmp_path_factory.mktemp("datasets"), count()

    def make(lengths: Sequence[int], *, first_token: int = 0) -> TokenDataset:
        prefix = folder / f"d{next(number)}"
        with DatasetWriter(prefix, vocab_size=60_000) as writer:
            for length in lengths:
                writer.add(np.arange(first_token, first_token + length))
                first_token += length
        return TokenDataset(prefix)

    return make
