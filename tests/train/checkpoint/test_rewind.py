"""Back to an older checkpoint and around a range of data: what is read, what is kept, what a restart does."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data.prefetch import Prefetcher
from tests.support.forked import Ended, run_forked
from tests.support.programs.record_rows import digest
from tests.support.runs import column, ending, lines, tensors
from train.checkpoint.rewind import RewindConfig, set_newer_aside, skipped_steps

STEPS = 10
REWIND = ("rewind.to=4", "rewind.skip=[6,8]")


def record_rows(file: Path, rank: int) -> None:
    """A fault for run_forked: notes what each step of this rank reads."""
    inner = Prefetcher.next_step

    def next_step(self: Prefetcher) -> list:
        batches = inner(self)
        rows = [digest(*row) for batch in batches for row in zip(batch.tokens, batch.targets, strict=True)]
        with file.with_suffix(f".{rank}").open("a") as out:
            out.write(json.dumps([self._step, rows]) + "\n")
        return batches

    Prefetcher.next_step = next_step  # type: ignore[method-assign]


def rows_of(file: Path, rank: int) -> dict[int, list[str]]:
    return dict(json.loads(line) for line in file.with_suffix(f".{rank}").read_text().splitlines())


def run(run_dir: Path, corpus: Path, *overrides: str, rows: Path) -> Ended:
    return run_forked(
        run_dir, f"data.sources=[{{path: {corpus}}}]", f"train.steps={STEPS}", "checkpoint.every=1",
        "checkpoint.keep=null", "data.packing=best_fit", *overrides, processes=2,
        fault=partial(record_rows, rows),
    )  # fmt: skip


def progress_at(run_dir: Path, step: int) -> dict:
    return json.loads((run_dir / f"checkpoints/step-{step}/manifest.json").read_text())["progress"]


def saved(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*"))


def same_state(first: Path, second: Path, step: int = STEPS) -> bool:
    a, b = (tensors(each / f"checkpoints/step-{step}") for each in (first, second))
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def runs(license_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain`: never rewound; `first` and `second`: copies of it, each rewound by the same command."""
    root = tmp_path_factory.mktemp("rewind")
    assert run(root / "plain", license_corpus, rows=root / "plain-rows").codes == [0, 0]
    for name in ("first", "second"):
        shutil.copytree(root / "plain", root / name)
        ended = run(root / name, license_corpus, *REWIND, rows=root / f"{name}-rows")
        assert ended.codes == [0, 0], ended.said
    return root


def test_a_rewound_run_leaves_out_exactly_the_range(runs: Path) -> None:
    for rank in range(2):
        before, after = (rows_of(runs / f"{name}-rows", rank) for name in ("plain", "first"))
        assert sorted(after) == list(range(5, STEPS + 1))
        assert after[5] == before[5]
        assert [after[step] for step in (6, 7, 8)] == [before[step] for step in (8, 9, 10)]
    plain, rewound = progress_at(runs / "plain", STEPS), progress_at(runs / "first", STEPS)
    assert rewound["rewinds"] == [[4, 6, 8]]
    assert plain["rewinds"] == []
    skipped = [
        progress_at(runs / "plain", 7)["consumed"][""][0] - progress_at(runs / "plain", 5)["consumed"][""][0]
    ]
    assert rewound["consumed"]["skipped by rewind"] == skipped
    assert "skipped by rewind" not in plain["consumed"]
    for step in range(5, STEPS + 1):  # the ledger is exact at every step, before the gap and after it
        taken = progress_at(runs / "first", step)["consumed"]
        past = taken.get("skipped by rewind", [0])[0]
        at = step if step < 6 else step + 2
        assert past == (0 if step < 6 else skipped[0])
        if at <= STEPS:
            assert taken[""][0] + past == progress_at(runs / "plain", at)["consumed"][""][0]
    assert (rewound["step"], rewound["tokens"]) == (plain["step"], plain["tokens"])


def test_a_rewind_loses_nothing(runs: Path) -> None:
    aside = runs / "first/previous-1"
    assert saved(aside) == [5, 6, 7, 8, 9, 10]
    assert saved(runs / "first") == list(range(1, STEPS + 1))
    assert all(same_state(aside, runs / "plain", step) for step in saved(aside))
    for name in ("metrics.jsonl", "experts.jsonl"):
        assert (aside / name).read_bytes() == (runs / "plain" / name).read_bytes()
    assert [record["step"] for record in lines(runs / "first")] == list(range(1, STEPS + 1))
    old, new = column(runs / "plain", "loss"), column(runs / "first", "loss")
    assert old[:5].tolist() == new[:5].tolist()
    assert np.all(old[5:] != new[5:])


def test_the_same_command_twice_gives_the_same_bits(runs: Path) -> None:
    assert same_state(runs / "first", runs / "second")
    for key in ("loss", "grad_norm"):
        assert column(runs / "first", key).tolist() == column(runs / "second", key).tolist()


@pytest.mark.parametrize(
    ("left", "again"), [(7, REWIND), (5, ())], ids=["after the gap", "before the gap and without the keys"]
)
def test_a_restart_does_not_rewind_again(
    left: int, again: tuple[str, ...], runs: Path, license_corpus: Path, tmp_path: Path
) -> None:
    """The job died after a save: it goes on from there, on the data that it would have read."""
    run_dir = tmp_path / "run"
    shutil.copytree(runs / "first", run_dir)
    for step in range(left + 1, STEPS + 1):
        shutil.rmtree(run_dir / f"checkpoints/step-{step}")
    ended = run(run_dir, license_corpus, *again, rows=tmp_path / "rows")
    assert ended.codes == [0, 0], ended.said
    assert sorted(rows_of(tmp_path / "rows", 0)) == list(range(left + 1, STEPS + 1))
    assert same_state(run_dir, runs / "first")
    assert progress_at(run_dir, STEPS)["rewinds"] == [[4, 6, 8]]
    assert [path.name for path in run_dir.glob("previous-*")] == ["previous-1"]


def test_a_rewind_to_a_step_that_is_not_there_moves_nothing(
    runs: Path, license_corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(runs / "plain", run_dir)
    shutil.rmtree(run_dir / "checkpoints/step-4")
    ended = run(run_dir, license_corpus, *REWIND, rows=tmp_path / "rows")
    assert ended.codes == [2, 2], ended.said
    kind, facts = ending(run_dir)
    assert kind == "FAILED"
    assert "rewind.to=4" in facts["reason"]
    assert "has no step-4, but steps [1, 2, 3, 5" in facts["reason"]
    assert saved(run_dir) == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert not list(run_dir.glob("previous-*"))


def test_a_range_that_overlaps_an_earlier_one_is_refused_before_anything_moves(
    runs: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(runs / "first", run_dir)
    (run_dir / "wandb_id").write_text("abandoned")
    before = sorted(run_dir.rglob("*"))
    problem = set_newer_aside(run_dir, RewindConfig(to=6, skip=[7, 9]))
    assert problem is not None
    assert "rewind.skip: [6, 8] and one from 7 overlap" in problem
    assert sorted(run_dir.rglob("*")) == before
    assert set_newer_aside(run_dir, RewindConfig(to=6, skip=[8, 9])) is None
    assert saved(run_dir) == [1, 2, 3, 4, 5, 6]
    assert not (run_dir / "wandb_id").exists()
    assert (run_dir / "previous-2/wandb_id").read_text() == "abandoned"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"progress": null}', '{"progress": {}}'])
def test_a_damaged_checkpoint_is_none_of_a_rewind(text: str, tmp_path: Path) -> None:
    """A newer one that cannot be read is set aside like the others."""
    for step in (4, 5):
        (tmp_path / f"checkpoints/step-{step}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step-{step}/manifest.json").write_text(text)
    assert set_newer_aside(tmp_path, RewindConfig(to=4, skip=[6, 8])) is None
    assert saved(tmp_path) == [4]


@pytest.mark.parametrize(
    ("to", "skip", "message"),
    [
        (None, [3, 5], r"rewind.skip=\[3, 5\] needs rewind.to"),
        (0, [], r"rewind.to=0 must be at least 1"),
        (4, [4, 5], r"rewind.skip=\[4, 5\] must be \[a, b\], rewind.to=4 < a < b"),
        (4, [6, 6], r"must be \[a, b\]"),
        (4, [6], r"must be \[a, b\]"),
    ],
)
def test_ranges_are_checked(to: int | None, skip: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewindConfig(to=to, skip=skip)


def test_ranges_of_several_rewinds() -> None:
    assert skipped_steps([[4, 6, 8], [10], [9, 12, 20]]) == {5: 7, 11: 19}
    with pytest.raises(ValueError, match=r"\[6, 8\] and one from 7 overlap"):
        skipped_steps([[4, 6, 8], [4, 7, 9]])
