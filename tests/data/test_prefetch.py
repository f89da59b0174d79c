import json
import time
from collections.abc import Callable
from threading import Event
from threading import enumerate as all_threads

import pytest
import torch

from data.config import DataConfig, Packing, SourceConfig
from data.dataset import TokenDataset
from data.loader import Loader, Shape
from data.mixture import Mixture
from data.packing import Batch
from data.prefetch import Prefetcher

MakeDataset = Callable[..., TokenDataset]


@pytest.fixture(scope="session")
def datasets(make_dataset: MakeDataset) -> list[TokenDataset]:
    lengths = [5, 1, 17, 3, 90, 2, 8, 8, 1, 30]
    return [make_dataset(lengths), make_dataset(lengths, first_token=1000)]


def build(datasets: list[TokenDataset]) -> Loader:
    sources = [SourceConfig(path=dataset.prefix) for dataset in datasets]
    cfg = DataConfig(sources=sources, packing=Packing.best_fit, window=4, eval_fraction=0)
    shape = Shape(16, 4, 2)
    return Loader(datasets, cfg, split="train", shape=shape, rank=0, size=1, seed=3, vocab_size=60_000)


def plan(step: int) -> tuple[Shape, Mixture]:
    """Rows grow and the mixture moves."""
    return Shape(16 + 4 * step, 4, 2), Mixture((1 - step / 20, step / 20))


def same(here: list[Batch], there: list[Batch]) -> bool:
    return all(torch.equal(a, b) for x, y in zip(here, there, strict=True) for a, b in zip(x, y, strict=True))


def test_the_same_steps_states_and_counts_as_without(datasets: list[TokenDataset]) -> None:
    plain, prefetcher = build(datasets), Prefetcher(build(datasets), plan)
    assert prefetcher.state_dict() == plain.state_dict()
    for step in range(12):
        assert same(prefetcher.next_step(), plain.next_step(*plan(step)))
        time.sleep(0.002 * (step % 3))  # however far the thread is
        assert prefetcher.state_dict() == plain.state_dict(), "what was only read ahead is not in it"
        if step % 5 == 4:
            assert prefetcher.read_counts() == plain.read_counts()
    prefetcher.close()


def test_resume_goes_on_after_the_last_step_handed_out(datasets: list[TokenDataset]) -> None:
    first, plain = Prefetcher(build(datasets), plan), build(datasets)
    for step in range(5):
        first.next_step()
        plain.next_step(*plan(step))
    state = json.loads(json.dumps(first.state_dict()))
    second = Prefetcher(build(datasets), plan, step=0)
    second.next_step()
    second.load_state_dict(state, step=5)
    loader = build(datasets)
    loader.load_state_dict(state)
    third = Prefetcher(loader, plan, step=5)
    for step in range(5, 9):
        expected = plain.next_step(*plan(step))
        assert same(first.next_step(), expected)
        assert same(second.next_step(), expected)
        assert same(third.next_step(), expected)


def test_error_of_the_thread_is_raised_by_the_call(datasets: list[TokenDataset]) -> None:
    def failing(step: int) -> tuple[Shape, Mixture]:
        if step == 2:
            raise ValueError("no plan")
        return plan(step)

    prefetcher = Prefetcher(build(datasets), failing)
    prefetcher.next_step()
    prefetcher.next_step()  # step 2 fails behind this one
    state = prefetcher.state_dict()
    for _ in range(2):
        with pytest.raises(ValueError, match="no plan"):
            prefetcher.next_step()
    assert prefetcher.state_dict() == state


def test_next_step_is_prepared_meanwhile_and_waiting_is_measured(datasets: list[TokenDataset]) -> None:
    gate, began = Event(), Event()

    def gated(step: int) -> tuple[Shape, Mixture]:
        if step == 1:
            began.set()
            gate.wait(10)
        if step == 2:
            time.sleep(0.2)
        return plan(step)

    prefetcher = Prefetcher(build(datasets), gated)
    prefetcher.next_step()
    assert began.wait(10), "the thread begins on its own"
    gate.set()
    prefetcher.next_step()
    prefetcher.read_wait_seconds()
    prefetcher.next_step()
    assert 0.1 < prefetcher.read_wait_seconds() < 5
    assert prefetcher.read_wait_seconds() == 0


def test_close_leaves_no_thread(datasets: list[TokenDataset]) -> None:
    before = set(all_threads())
    prefetcher = Prefetcher(build(datasets), plan)
    prefetcher.next_step()
    prefetcher.close()
    assert not set(all_threads()) - before
    prefetcher.close()


@pytest.mark.parametrize("end", [3, 5])
def test_a_gap_in_the_data_is_what_the_steps_in_it_read(datasets: list[TokenDataset], end: int) -> None:
    """Before step 2 the data of steps 2 to end - 1 are left out, with their own sizes and mixtures."""
    whole, gapped = (Prefetcher(build(datasets), plan) for _ in range(2))
    steps = [whole.next_step() for _ in range(8)]
    taken = [0] * len(datasets)
    gapped.load_state_dict(build(datasets).state_dict(), step=0, skips={2: end})
    plain = Prefetcher(build(datasets), plan)
    for number in range(end):
        before = plain.state_dict()["source_tokens"]
        plain.next_step()
        if number >= 2:
            after = plain.state_dict()["source_tokens"]
            taken = [total + b - a for total, a, b in zip(taken, before, after, strict=True)]
    assert all(same(gapped.next_step(), steps[number]) for number in range(2))
    assert gapped.state_dict()["skipped_tokens"] == [0] * len(datasets)  # read ahead, not handed out
    gapped.next_step()
    state = gapped.state_dict()
    assert state["skipped_tokens"] == taken
    assert sum(taken) > 0
    resumed = Prefetcher(build(datasets), plan)
    resumed.load_state_dict(state, step=3, skips={2: end})
    for each in (gapped, resumed):
        assert each.next_step() is not None
        assert each.state_dict()["skipped_tokens"] == taken
    assert gapped.state_dict() == resumed.state_dict()
