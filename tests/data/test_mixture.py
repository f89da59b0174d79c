import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.mixture import FINEST, Deficits, Mixture, Unit, unit_shares
from data.stream import DocumentOrder


def unit(source: int, bucket: int = 0, tokens: int = 100) -> Unit:
    return Unit(source, bucket, DocumentOrder(np.array([tokens]), np.array([0]), key=(0,)), None)


def test_shares_are_the_weights_as_written() -> None:
    two = [unit(0), unit(1)]
    assert unit_shares(Mixture((0.7, 0.3)), two) == unit_shares(Mixture((7, 3)), two) == [7, 3]
    assert unit_shares(Mixture((1e-3, 1)), two) == [1, 1000]
    assert unit_shares(Mixture((0, 2.5)), two) == [0, 1]


def test_shares_of_lengths_are_exact_and_sources_share_a_bucket_by_weight() -> None:
    units = [unit(0, 0), unit(0, 1), unit(1, 0)]  # only source 0 has long documents
    assert unit_shares(Mixture((3, 1), (0.5, 0.5)), units) == [3, 4, 1]
    assert unit_shares(Mixture((3, 1), (1, 0)), units) == [3, 0, 1]


def test_lengths_as_they_come_follow_the_tokens() -> None:
    units = [unit(0, 0, tokens=30), unit(0, 1, tokens=70), unit(1, 0)]
    assert unit_shares(Mixture((0.5, 0.5)), units) == [3, 7, 10]


def test_share_of_an_exhausted_unit_stays_in_its_bucket_if_it_can() -> None:
    units = [unit(0, 0), unit(1, 0), unit(0, 1), unit(1, 1)]
    mixture = Mixture((3, 1), (0.4, 0.6))
    assert unit_shares(mixture, units) == [3 * 2, 1 * 2, 3 * 3, 1 * 3]
    assert unit_shares(mixture, units, {2}) == [3, 1, 0, 6]
    assert unit_shares(mixture, units, {2, 3}) == [3, 1, 0, 0]
    assert unit_shares(mixture, units, {0, 1, 2, 3}) == [0, 0, 0, 0]


def test_share_of_a_bucket_without_documents_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.length_shares\[1\]=0\.5, but .*change data\.length_bounds"):
        unit_shares(Mixture((1, 0), (0.5, 0.5)), [unit(0, 0), unit(1, 0), unit(1, 1)])


def test_fine_weights_are_rounded_but_none_vanishes() -> None:
    shares = unit_shares(Mixture((1e-30, 1 / 3, 0.0, 2 / 3)), [unit(i) for i in range(4)])
    assert shares[0] == 1
    assert shares[2] == 0
    assert sum(shares) <= FINEST + 4
    assert shares[3] / shares[1] == pytest.approx(2, rel=1e-12)


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 9), min_size=3, max_size=3), st.integers(1, 50)), min_size=1)
)
def test_each_unit_stays_within_a_few_draws_of_its_share(phases: list[tuple[list[int], int]]) -> None:
    deficits, given_tokens, due = Deficits(3), np.zeros(3), np.zeros(3)
    sizes = np.random.default_rng(0).integers(1, 11, 10_000).tolist()
    for shares, draws in phases:
        if not any(shares):
            continue
        deficits.set_shares(shares)
        for _ in range(draws):
            size = sizes.pop()
            place = deficits.pick(10)
            assert shares[place] > 0
            deficits.charge(place, size)
            given_tokens[place] += size
            due += np.array(shares) / sum(shares) * size
        assert (given_tokens - due).max() <= 30
    state = Deficits(3)
    state.load_state_dict(deficits.state_dict())
    assert state.state_dict() == deficits.state_dict()


def test_weights_may_change_at_every_draw() -> None:
    deficits, given_tokens, due = Deficits(2), np.zeros(2), np.zeros(2)
    for draw in range(1000):
        shares = [100 + draw % 7, 7 + draw % 5]
        deficits.set_shares(shares)
        place = deficits.pick(10)
        deficits.charge(place, 10)
        given_tokens[place] += 10
        due += np.array(shares) / sum(shares) * 10
    assert abs(given_tokens - due).max() < 20


def test_nothing_is_left_to_pick() -> None:
    deficits = Deficits(2)
    deficits.set_shares([0, 0])
    with pytest.raises(ValueError, match=r"raise data\.sources\[\*\]\.max_epochs"):
        deficits.pick(1)
