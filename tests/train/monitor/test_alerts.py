"""When alerts about dead experts and dropped choices come."""

from typing import Any

import numpy as np

from tests.support.expert_records import experts_of, record_of
from train.monitor.alerts import ExpertWatch, layer_drop_rates


def test_drop_rate_of_a_layer_without_choices_is_zero() -> None:
    load, dropped = np.array([[0.0, 0], [3, 5], [8, 8]]), np.array([[0.0, 0], [0, 2], [0, 2]])
    assert layer_drop_rates(load, dropped).tolist() == [0, 0.25, 0.125]


BALANCED = [[10, 10], [10, 10]]


def titles(watch: ExpertWatch, *loads: Any, **changes: Any) -> list[list[str]]:
    """Texts of the alerts after each load."""
    return [
        [alert.text for alert in watch.feed(record_of(step, **changes), experts_of(step, load))]
        for step, load in enumerate(loads, start=1)
    ]


def test_a_dead_expert_is_reported_at_each_begin() -> None:
    watch = ExpertWatch(dead_after=2, max_drop_rate=None)
    dead = [[20, 0], [10, 10]]
    texts = titles(watch, BALANCED, dead, dead, dead, BALANCED, dead, dead, dead)
    assert [len(found) for found in texts] == [0, 0, 1, 0, 0, 0, 1, 0]
    assert texts[2][0].startswith("step 3: layer 0 expert 1: no choice in 2 intervals")
    other = [[20, 0], [0, 20]]
    assert [len(found) for found in titles(watch, other, other, other)] == [0, 1, 0]


def test_a_second_death_names_only_the_new_expert() -> None:
    watch = ExpertWatch(dead_after=1, max_drop_rate=None)
    ((first,), (second,)) = titles(watch, [[20, 0], [10, 10]], [[20, 0], [0, 20]])
    assert "layer 0 expert 1:" in first
    assert "1 dead in all" in first
    assert "layer 0" not in second
    assert "layer 1 expert 0:" in second
    assert "2 dead in all" in second


def test_many_dead_experts_are_counted() -> None:
    watch = ExpertWatch(dead_after=1, max_drop_rate=None)
    (((text),),) = titles(watch, [[160] + [0] * 15, [10] * 16])
    assert "layer 0 expert 5 and 10 more: no choice" in text
    assert "expert 6" not in text
    assert "15 dead in all" in text


def test_small_loads_say_nothing_about_silence() -> None:
    watch = ExpertWatch(dead_after=2, max_drop_rate=None)
    small, dead = [[15, 0], [15, 0]], [[16, 0], [15, 0]]
    counts = [len(found) for found in titles(watch, small, small, small, dead, small, dead, small, dead)]
    assert counts == [0, 0, 0, 0, 0, 1, 0, 0]
    alive = [[0, 1], [1, 1]]  # too few choices on average, but there is one
    assert [len(found) for found in titles(watch, alive, dead, dead)] == [0, 0, 1]


def test_drops_are_reported_at_each_begin() -> None:
    watch = ExpertWatch(dead_after=None, max_drop_rate=0.1)
    found = []
    for step, rate in enumerate([0.1, 0.11, 0.2, 0.1, 0.3], start=1):
        experts = experts_of(step, BALANCED, dropped=[[1, 1], [1, 3]])
        found.append([alert.text for alert in watch.feed(record_of(step, drop_rate=rate), experts)])
    assert [len(texts) for texts in found] == [0, 1, 0, 0, 1]
    assert found[1][0].startswith(
        "step 2: 11.0% of the choices were dropped, more than log.max_drop_rate=0.1;"
    )
    assert "worst is layer 1 with 20.0%" in found[1][0]


def test_small_loads_say_nothing_about_drops() -> None:
    watch = ExpertWatch(dead_after=None, max_drop_rate=0.1)
    assert titles(watch, [[7, 8], [7, 8]], drop_rate=0.9) == [[]]
    assert len(titles(watch, [[8, 8], [8, 8]], drop_rate=0.9)[0]) == 1


def test_null_never_warns() -> None:
    watch = ExpertWatch(dead_after=None, max_drop_rate=None)
    assert titles(watch, *[[[90, 0], [90, 0]]] * 5, drop_rate=1.0) == [[]] * 5
