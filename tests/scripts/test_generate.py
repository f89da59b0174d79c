"""scripts/generate.py on a checkpoint that two processes wrote."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data.config import DataConfig, SourceConfig
from data.dataset import TokenDataset
from data.loader import Loader, Shape
from scripts.generate import main
from tests.support.runs import lines
from train.checkpoint.load_model import end_token, find_tokenizer, load_model, open_checkpoint
from train.checkpoint.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["Flight Paris 47 is on time. The train to the coast", "Rain fell", "Flight Oslo 11 is"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    return (code, *capsys.readouterr())


def records(capsys: pytest.CaptureFixture[str], run_dir: Path, *arguments: object) -> list[dict[str, Any]]:
    given = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    code, out, err = run(capsys, "--checkpoint", run_dir, "--json", *given, *arguments)
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


def test_weights_of_two_processes_give_their_held_out_loss(trained: Path, needles: Path) -> None:
    checkpoint = open_checkpoint(trained)
    model = load_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    assert max(float(router.bias.abs().max()) for router in model.routers()) > 0.1  # three updates
    silent = checkpoint.config["data"]["no_loss_tokens"]
    data = DataConfig(sources=[SourceConfig(path=str(needles))], eval_fraction=0.1, no_loss_tokens=silent)
    where: dict[str, Any] = {"rank": 0, "size": 1, "vocab_size": 128, "seed": 0, "split": "eval"}
    total = count = 0.0
    for batch in Loader([TokenDataset(needles)], data, shape=Shape(64, 8, 4), **where).next_step():
        with torch.no_grad():
            losses = model(batch.tokens, batch.offsets, targets=batch.targets)
        total, count = total + float(losses.sum()), count + int((batch.targets >= 0).sum())
    assert math.isclose(total / count, lines(trained)[-1]["eval_loss"], rel_tol=1e-5)


def test_narrow_weights_keep_wide_gates_and_slopes(trained: Path) -> None:
    checkpoint, cpu = open_checkpoint(trained / "checkpoints/step-3"), torch.device("cpu")
    wide = load_model(checkpoint, device=cpu, dtype=torch.float32)
    narrow = load_model(checkpoint, device=cpu, dtype=torch.bfloat16)
    for (name, a), b in zip(wide.named_parameters(), narrow.parameters(), strict=True):
        assert b.dtype is (torch.float32 if "router.gate" in name else torch.bfloat16)
        assert torch.equal(a.to(b.dtype), b)
    for a, b in zip(wide.buffers(), narrow.buffers(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_the_command(trained: Path) -> None:
    """The literal command line, as plain text: every prompt with what follows it."""
    command = [sys.executable, str(ROOT / "scripts/generate.py"), "--checkpoint", str(trained)]
    command += ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--max-tokens", "5", "--temperature", "0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first.startswith("Flight Paris 47 is on time . The train to the coast ")
    assert second.startswith("Rain fell ")
    assert "step 3, " in result.stderr
    assert "tokens after 14 of prompts" in result.stderr


def test_options_reach_the_choice_of_tokens(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = records(capsys, trained, "--temperature", 0, "--max-tokens", 9)
    assert [record["prompt"] for record in greedy] == PROMPTS
    assert {len(record["tokens"]) for record in greedy if not record["finished"]} <= {9}
    assert records(capsys, trained, "--temperature", 0, "--max-tokens", 9, "--chunk", 3) == greedy
    assert records(capsys, trained, "--top-k", 1, "--max-tokens", 9) == greedy
    assert records(capsys, trained, "--top-p", 1e-9, "--max-tokens", 9) == greedy
    warm = records(capsys, trained, "--temperature", 2, "--max-tokens", 9, "--seed", 4)
    assert warm == records(capsys, trained, "--temperature", 2, "--max-tokens", 9, "--seed", 4)
    assert warm != records(capsys, trained, "--temperature", 2, "--max-tokens", 9, "--seed", 5)


def test_a_prompt_stops_at_the_end_of_its_document(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free = records(capsys, trained, "--temperature", 0, "--max-tokens", 6)
    tokenizer = find_tokenizer(open_checkpoint(trained), None)
    last = free[0]["tokens"][2]
    name = tokenizer.id_to_token(last)
    stopped = records(capsys, trained, "--temperature", 0, "--max-tokens", 6, "--eos-token", name)
    assert stopped[0]["finished"]
    assert stopped[0]["tokens"] == free[0]["tokens"][: free[0]["tokens"].index(last) + 1]


def test_tokenizer_of_the_checkpoint_goes_before_that_of_the_data(trained: Path, tmp_path: Path) -> None:
    """An imported model brings its own, in the checkpoint's folder."""
    step = shutil.copytree(trained / "checkpoints/step-3", tmp_path / "imported")
    (step / "tokenizer").mkdir()
    tokenizer = find_tokenizer(open_checkpoint(trained), None)
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"]["Atlantis"] = 127
    (step / "tokenizer/tokenizer.json").write_text(json.dumps(content))
    assert find_tokenizer(open_checkpoint(step), None).token_to_id("Atlantis") == 127
    assert tokenizer.token_to_id("Atlantis") is None


def test_the_end_of_a_document_is_the_one_of_the_data(trained: Path, needles: Path, tmp_path: Path) -> None:
    """Whatever it is called: prepare_data.py --eos-token may have named it."""
    tokenizer = find_tokenizer(open_checkpoint(trained), None)
    manifest = json.loads(Path(f"{needles}.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps({**manifest, "eos_id": 9}))
    config = {"data": {"sources": [{"path": str(tmp_path / "data")}]}}
    renamed = Manifest(tmp_path, 0, {}, {}, {"config": config})
    assert end_token(renamed, tokenizer, None) == 9
    assert end_token(renamed, tokenizer, "Rain") == tokenizer.token_to_id("Rain")
    assert end_token(open_checkpoint(trained), tokenizer, None) == 0
    imported = Manifest(tmp_path, 0, {}, {}, {"config": {}})
    assert end_token(imported, tokenizer, None) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "{tmp}"], "{tmp}/manifest.json: not readable"),
        (["--tokenizer", "{tmp}"], "tokenizer {tmp}/tokenizer.json not found; name a tokenizer.json"),
        (
            ["--tokenizer", "corpus/tokenizer.json"],
            "has 4096 ids, the model 128; give the run's own: --tokenizer",
        ),
        (["--prompt", ""], "prompt 1 is empty or ends with the end-of-document token"),
        (["--eos-token", "Atlantis"], "--eos-token Atlantis is no token of the tokenizer"),
        (["--max-tokens", "0"], "--max-tokens 0 must be at least 1"),
        (["--temperature", "-1"], "temperature=-1.0 must be >= 0"),
        (["--device", "cuda"], "--device cuda, but torch sees no GPU"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_used_is_named(
    arguments: list[str], message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        arguments, message = ["--chunk", "0"], "--chunk 0 must be at least 1"
    given = [word.format(tmp=tmp_path) for word in arguments]
    code, out, err = run(capsys, "--checkpoint", trained, "--prompt", PROMPTS[1], *given)
    assert code == 2
    assert out == ""
    assert message.format(tmp=tmp_path) in err
    assert len(err.splitlines()) == 1
