"""scripts/evaluate.py: where needles lie, what counts as found, perplexity against plain forward passes."""

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from data.dataset import DatasetWriter, TokenDataset
from data.stream import split_documents
from data.tokenizer import load_tokenizer
from scripts.evaluate import main, read_texts
from scripts.needles import SENTENCES, encoder, make_document, make_task
from scripts.needles import main as write_needles
from train.checkpoint.load_model import load_model, open_checkpoint
from train.checkpoint.manifest import Manifest


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    return (code, *capsys.readouterr())


@pytest.fixture(scope="module")
def tokenizer(needles: Path) -> Any:
    return load_tokenizer(f"{needles}.tokenizer.json")


@pytest.mark.parametrize("tokens", [60, 101, 256])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_task_has_its_length_and_the_needle_its_depth(tokenizer: Any, tokens: int, depth: float) -> None:
    draw = np.random.default_rng(1)
    for _ in range(20):
        task = make_task(encoder(tokenizer), SENTENCES, draw, tokens=tokens, depth=depth, distractors=3)
        assert len(task.prompt) + len(task.answer) == tokens
        text, answer = tokenizer.decode(task.prompt), tokenizer.decode(task.answer)
        key = text.split()[-1]
        assert text.endswith(f"Flight {key}")
        assert text.count(f"Flight {key} {answer} is on time .") == 1
        assert text.count("Flight") == 5
        assert text.count(answer) == 1
        before = len(text[: text.index(f"Flight {key}")].split())
        room = tokens - 4 * 7 - 3
        assert -6 <= before - depth * room <= 3 * 7 + 6  # to a sentence's border; distractors may lie before


def test_questions_depend_on_the_seed_alone(tokenizer: Any) -> None:
    def make(seed: int) -> Any:
        draw = np.random.default_rng(seed)
        return make_task(encoder(tokenizer), SENTENCES, draw, tokens=90, depth=0.5, distractors=1)

    assert make(1) == make(1) != make(2)


def test_a_document_repeats_its_facts_and_ends_with_one(tokenizer: Any) -> None:
    draw, repeats = np.random.default_rng(0), 0
    for _ in range(100):
        document = make_document(encoder(tokenizer), draw, 63)
        words = tokenizer.decode(document).split()
        assert len(document) == len(words) == 63
        assert "<|endoftext|>" not in words
        codes: dict[str, str] = {}
        for place in (i for i, word in enumerate(words) if word == "Flight"):
            key, value = words[place + 1], words[place + 2]
            repeats += key in codes
            assert codes.setdefault(key, value) == value
        assert words[-7] == "Flight"
        assert words.count(words[-6]) > 1
    assert repeats > 150


def test_needles_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write_needles(["--output", str(tmp_path / "x"), "--documents", "1", "--tokens", "14"]) == 2
    assert "--tokens 14 must be at least 24" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_niah_counts_answers_and_draws_them(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of a model that looks back no further than 40 tokens."""

    def answer(model: Any, prompts: list[list[int]], **_: Any) -> list[list[int]]:
        found = []
        for prompt in prompts:
            key, tail = prompt[-1], prompt[-40:-2]
            found.append([tail[tail.index(key) + 1] if key in tail else 0])
        return found

    monkeypatch.setattr("scripts.evaluate.continue_prompts", answer)
    code, out, err = run(
        capsys, "niah", "--checkpoint", trained, "--lengths", "256,40", "--depths", 3, "--samples", 4,
        "--rows", 3, "--distractors", 1, "--output", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    results = json.loads((tmp_path / "niah.json").read_text())
    assert results["lengths"] == [40, 256]
    assert results["depths"] == [0, 0.5, 1]
    assert results["found"] == [[1, 0], [1, 0], [1, 1]]
    assert results["trained_length"] == 64
    assert out.splitlines()[1].split() == ["0", "%", "100", "0"]
    svg = ElementTree.fromstring((tmp_path / "niah.svg").read_text())
    texts = ["".join(text.itertext()) for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert "Needles found, % (trained at 64 tokens)" in texts
    assert texts.count("100") == 4
    page = (tmp_path / "niah.html").read_text()
    assert "depth 100 %, 256 tokens: 100.0 %" in page
    assert "http://" not in page
    assert "src=" not in page


def test_niah_of_a_real_model(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Three steps of training find next to nothing, in any batch and by pieces of any size alike."""
    haystack = tmp_path / "hay.txt"
    haystack.write_text("Rain fell on the road .\n\nTwo birds sit\n")
    found = []
    for more in (["--rows", 1, "--chunk", 7], ["--rows", 5]):
        code, _, err = run(
            capsys, "niah", "--checkpoint", trained, "--lengths", "64", "--depths", 1, "--samples", 5,
            "--haystack", haystack, "--output", tmp_path, *more,
        )  # fmt: skip
        assert code == 0, err
        found.append(json.loads((tmp_path / "niah.json").read_text()))
    assert found[0] == found[1]
    assert found[0]["mean"][0] < 0.5


def test_perplexity_equals_that_of_whole_forward_passes(
    trained: Path, needles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw, texts = np.random.default_rng(3), []
    with DatasetWriter(tmp_path / "long", vocab_size=128) as writer:
        for length in (150, 90, 200, 121):
            texts.append(draw.integers(128, size=length))
            writer.add(texts[-1])
    code, out, err = run(
        capsys, "perplexity", "--checkpoint", trained, "--data", tmp_path / "long", "--lengths", "50,120",
        "--rows", 2, "--chunk", 33,
    )  # fmt: skip
    assert code == 0, err
    results = json.loads((trained / "perplexity.json").read_text())
    model = load_model(open_checkpoint(trained), device=torch.device("cpu"), dtype=torch.float32)
    losses = []
    for text in (texts[0], texts[2], texts[3]):
        ids = torch.from_numpy(text)[None, :121]
        with torch.no_grad():
            losses.append(model(ids[:, :-1], torch.tensor([[0, 120]]), targets=ids[:, 1:])[0].double())
    mean = torch.stack(losses).mean(0)
    expected = [mean[:50].mean(), mean.mean(), mean[:50].mean(), mean[50:].mean()]
    found = [*results["perplexity"], *results["newest"]]
    assert results["documents"] == 3
    assert found == pytest.approx([math.exp(x) for x in expected], rel=1e-5)
    assert len(out.splitlines()) == 5
    # one row was left for the last batch: a lightning layer and a softmax layer of 8 heads of 16 in fp32
    assert results["state_bytes"] == 8 * 16 * 16 * 4
    assert results["cache_bytes"] == 2 * 120 * 8 * 16 * 4
    ElementTree.fromstring((trained / "perplexity.svg").read_text())
    assert "trained at 64 tokens" in (trained / "perplexity.html").read_text()


def test_perplexity_of_what_the_run_held_out(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "perplexity", "--checkpoint", trained, "--lengths", "12,23")
    assert code == 0, err
    assert json.loads((trained / "perplexity.json").read_text())["documents"] == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["perplexity"], "tokens; --lengths 256 needs one more; use shorter or --data"),
        (["perplexity", "--data", "{tmp}/none"], "none.idx not found"),
        (["perplexity", "--data", "{tmp}/wide", "--lengths", "5"], "holds token 300, the model knows 128"),
        (["niah", "--lengths", "20"], "20 tokens do not hold 4 facts, question and answer; 11 more do"),
        (["niah", "--haystack", "{tmp}/none.txt"], "none.txt: [Errno 2]"),
        (["niah", "--samples", "0"], "--samples 0 must be at least 1"),
        (["niah", "--distractors", "-1"], "--distractors -1 must lie in [0, 15]"),
        (["niah", "--distractors", "16"], "--distractors 16 must lie in [0, 15]"),
        (["niah", "--seed", "-1"], "--seed -1 must lie in [0, "),
        (["niah", "--output", "{tmp}/wide.bin"], "File exists: '{tmp}/wide.bin'"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_what_cannot_be_used_is_named(
    arguments: list[str], message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with DatasetWriter(tmp_path / "wide", vocab_size=400) as writer:
        writer.add(np.full(20, 300))
    given = [word.format(tmp=tmp_path) for word in arguments]
    code, _, err = run(capsys, *given, "--checkpoint", trained)
    assert code == 2
    assert message.format(tmp=tmp_path) in err
    assert len(err.splitlines()) == 1


def test_held_out_documents_are_not_those_of_the_training(needles: Path) -> None:
    """The split that perplexity reads by default is the loader's."""
    config = {
        "model": {"vocab_size": 128},
        "data": {"sources": [{"path": str(needles)}], "eval_fraction": 0.1},
    }
    checkpoint = Manifest(needles, 0, {}, {}, {"config": config})
    texts = read_texts(checkpoint, None, 24, 999)
    dataset = TokenDataset(needles)
    training = split_documents(dataset.document_lengths, split="train", eval_fraction=0.1)
    assert 10 < len(texts) == dataset.num_documents - len(training) < 60
