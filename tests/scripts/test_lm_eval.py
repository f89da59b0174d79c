"""lm-evaluation-harness over an export: the documented commands and task find our own likelihoods."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from data.tokenizer import load_tokenizer
from scripts.convert_hf import main as convert
from scripts.needles import SENTENCES, encoder, make_task
from tests.support.forked import pretrain
from train.checkpoint.load_model import load_model, open_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def likelihoods(run_dir: Path, tasks: list[tuple[list[int], list[int]]]) -> tuple[float, list[bool]]:
    """Mean log-likelihood of the answers, and which of them are the most probable ones."""
    model = load_model(open_checkpoint(run_dir), device=torch.device("cpu"), dtype=torch.float32)
    sums, greedy = [], []
    for prompt, answer in tasks:
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            logits = model(ids, torch.tensor([[0, ids.shape[1]]]))[0, -1 - len(answer) : -1]
        target = torch.tensor(answer)
        sums.append(float(logits.log_softmax(-1).gather(1, target[:, None]).sum()))
        greedy.append(bool((logits.argmax(-1) == target).all()))
    return float(np.mean(sums)), greedy


@pytest.mark.slow
def test_the_harness_finds_our_likelihoods(needles: Path, tmp_path: Path) -> None:
    assert find_spec("lm_eval"), "lm-evaluation-harness is missing: pip install -r requirements/lm-eval.lock"
    assert find_spec("accelerate"), (
        "lm-evaluation-harness is missing: pip install -r requirements/lm-eval.lock"
    )
    run_dir, export, task = tmp_path / "run", tmp_path / "export", tmp_path / "task"
    pretrain(
        "conf=needles", f"data.sources=[{{path: {needles}}}]", f"run_dir={run_dir}", "train.steps=20",
        "batch.row_tokens=64", "batch.micro_rows=4", "batch.global_tokens=1024", "eval.every=null",
        "model.rotary_dim=16", "schedule.warmup_tokens=0",
    )  # fmt: skip
    assert convert(["export", "--checkpoint", str(run_dir), "--output", str(export)]) == 0
    tokenizer = load_tokenizer(f"{needles}.tokenizer.json")
    draw = np.random.default_rng(0)
    tasks = [
        make_task(encoder(tokenizer), SENTENCES, draw, tokens=length, depth=0.5, distractors=1)
        for length in (30, 64, 47, 30)
    ]
    task.mkdir()
    lines = [
        json.dumps({"prompt": tokenizer.decode(prompt), "answer": " " + tokenizer.decode(answer)})
        for prompt, answer in tasks
    ]
    (task / "flights.jsonl").write_text("\n".join(lines) + "\n")
    text = (
        (ROOT / "docs/guides/evaluation.md").read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    )
    local = yaml.safe_load(text.replace("tasks/flights.jsonl", str(task / "flights.jsonl")))
    (task / "flights.yaml").write_text(yaml.safe_dump(local))
    subprocess.run(
        [
            sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--model_args",
            f"pretrained={export},dtype=float32", "--tasks", "flights", "--include_path", str(task),
            "--output_path", str(tmp_path / "results"), "--batch_size", "2",
        ],
        check=True, timeout=280, cwd=tmp_path,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    (file,) = (tmp_path / "results").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]["flights"]
    mean, greedy = likelihoods(run_dir, [(t.prompt, t.answer) for t in tasks])
    assert results["perplexity,none"] == pytest.approx(np.exp(-mean), rel=1e-4)
    assert results["acc,none"] == pytest.approx(np.mean(greedy))
