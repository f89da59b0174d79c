"""Which token is chosen, and continuations of batches of prompts."""

from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.sampling import Sampling, choose, continue_prompts
from model.transformer import Transformer
from tests.support.small_models import SMALL, initialised

LOGITS = torch.tensor([0.5, 0.0, 0.25, 0.15, 0.1]).log()
DRAWS = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
"""Evenly spread, so that shares come out exactly."""


@pytest.fixture(scope="module")
def model() -> Transformer:
    return initialised(ModelConfig(**SMALL), 5)


@pytest.mark.parametrize(
    ("how", "shares"),
    [
        ({"temperature": 1.0}, [0.5, 0, 0.25, 0.15, 0.1]),
        ({"temperature": 0.0}, [1, 0, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 2}, [2 / 3, 0, 1 / 3, 0, 0]),
        ({"temperature": 1.0, "top_k": 99}, [0.5, 0, 0.25, 0.15, 0.1]),
        ({"temperature": 1.0, "top_p": 0.75}, [2 / 3, 0, 1 / 3, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.76}, [0.5 / 0.9, 0, 0.25 / 0.9, 0.15 / 0.9, 0]),
        ({"temperature": 1.0, "top_p": 1e-9}, [1, 0, 0, 0, 0]),
        ({"temperature": 0.5}, [0.25 / 0.345, 0, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.5}, [1, 0, 0, 0, 0]),
    ],
)
def test_shares_of_the_chosen_tokens(how: dict[str, Any], shares: list[float]) -> None:
    chosen = choose(LOGITS.expand(len(DRAWS), -1), DRAWS, Sampling(**how))
    found = torch.bincount(chosen, minlength=5) / len(DRAWS)
    assert (found - torch.tensor(shares)).abs().max() <= 1 / len(DRAWS)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be >= 0"),
        ({"temperature": float("nan")}, "temperature=nan must be >= 0"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
    ],
)
def test_impossible_sampling_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**how)


def greedy(model: Transformer, prompt: list[int], end: int | None, max_tokens: int) -> list[int]:
    """The same by whole forward passes over the last document of the row."""
    model.eval()
    row = prompt[max((i + 1 for i, token in enumerate(prompt) if token == end), default=0) :]
    written: list[int] = []
    while len(written) < max_tokens and (not written or written[-1] != end):
        ids = torch.tensor([row + written])
        with torch.no_grad():
            written.append(int(model(ids, torch.tensor([[0, ids.shape[1]]]))[0, -1].argmax()))
    return written


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_batches_of_prompts_continue_as_each_alone_by_full_passes(model: Transformer, chunk: int) -> None:
    prompts = [[5], [7, 3, 50, 3, 9, 11], list(range(20, 60)), [4, 1, 3, 8]]
    end = greedy(model, prompts[2], None, 4)[3]  # that one ends before the others
    assert end not in prompts[1]
    expected = [greedy(model, prompt, end, 12) for prompt in prompts]
    assert len(expected[2]) <= 4 < max(map(len, expected))
    found = continue_prompts(model, prompts, end=end, max_tokens=12, how=Sampling(), chunk=chunk)
    assert found == expected


def test_the_end_of_a_document_inside_a_prompt_forgets_it(model: Transformer) -> None:
    how = Sampling()
    first = continue_prompts(model, [[9, 8, 7, 3, 50, 60]], end=3, max_tokens=8, how=how)
    other = continue_prompts(model, [[1, 2, 3, 50, 60]], end=3, max_tokens=8, how=how)
    alone = continue_prompts(model, [[50, 60]], end=3, max_tokens=8, how=how)
    assert first == other == alone


def test_a_seed_repeats_and_rows_do_not_depend_on_their_company(model: Transformer) -> None:
    def sample(seed: int, *prompts: list[int]) -> list[list[int]]:
        how = Sampling(temperature=1.0, seed=seed)
        return continue_prompts(model, prompts, end=None, max_tokens=16, how=how)

    both = sample(1, [5, 6, 7], [5, 6, 7])
    assert sample(1, [5, 6, 7], [9]) == [both[0], sample(1, [1], [9])[1]]
    assert both[0] != both[1]
    assert sample(2, [5, 6, 7]) != both[:1]


def test_no_tokens_and_prompts_without_text(model: Transformer) -> None:
    assert continue_prompts(model, [[1], [2]], end=None, max_tokens=0, how=Sampling()) == [[], []]
    for prompts, which in (([[1], []], "prompt 1 is empty"), ([[4, 3]], "prompt 0 is empty or ends")):
        with pytest.raises(ValueError, match=which):
            continue_prompts(model, prompts, end=3, max_tokens=1, how=Sampling())
