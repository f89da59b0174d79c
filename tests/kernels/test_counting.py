"""Choices counted and placed by the kernels, against torch's stable sort."""

import pytest
import torch
from torch import Tensor

from kernels.counting import CONFIGS, Config, count_blocks, count_sort
from kernels.permute import sort_choices
from kernels.reference import count_keys
from tests.support.kernel_checks import DEVICE

SIZES = [(0, 3), (1, 1), (63, 5), (128, 32), (1000, 33), *([(70_001, 160)] if DEVICE.type == "cuda" else [])]


def draw_keys(choices: int, num_keys: int, kind: str) -> Tensor:
    """Keys of every number, `num_keys` among them, or only one key."""
    generator = torch.Generator().manual_seed(choices)
    keys = torch.randint(0, num_keys + 1, (choices,), generator=generator)
    only = {"random": keys, "one": torch.full_like(keys, num_keys // 2), "uncounted": keys * 0 + num_keys}
    return only[kind].to(DEVICE)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", ["random", "one", "uncounted"])
@pytest.mark.parametrize(("choices", "num_keys"), SIZES)
def test_sorts_as_torch_does(choices: int, num_keys: int, kind: str, config: Config) -> None:
    keys = draw_keys(choices, num_keys, kind)
    order, inverse, ends = count_sort(keys, num_keys, config)
    expected = sort_choices(keys.cpu(), num_keys)
    assert ends.dtype == torch.int32
    for mine, theirs in zip((order, inverse, ends), expected, strict=True):
        assert torch.equal(mine.cpu(), theirs)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("choices", "num_keys"), SIZES)
def test_counts_of_blocks(choices: int, num_keys: int, config: Config) -> None:
    """Each block's own counts, the uncounted last; their sum is the twin's."""
    keys = draw_keys(choices, num_keys, "random")
    blocks = count_blocks(keys, num_keys, config)
    parts = keys.split(config.choices) if choices else [keys]
    expected = torch.stack([torch.bincount(part, minlength=num_keys + 1) for part in parts])
    assert torch.equal(blocks.long(), expected)
    assert torch.equal(blocks.sum(0)[:num_keys], count_keys(keys, num_keys))
    assert torch.equal(count_keys(keys, num_keys), sort_choices(keys, num_keys).counts)


def test_running_sums_over_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.counting.SCAN_BLOCKS", 2)
    keys = draw_keys(1000, 33, "random")
    for mine, theirs in zip(count_sort(keys, 33), sort_choices(keys.cpu(), 33), strict=True):
        assert torch.equal(mine.cpu(), theirs)
