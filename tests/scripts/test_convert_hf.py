"""Hugging Face folders in and out: every byte, transformers' own logits, memory, and what is refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data.tokenizer import train_tokenizer
from model.config import LayerType, SlopeRule
from parallel.mesh import one_process
from scripts.hf.config import Layout
from scripts.hf.names import BUFFERS, hf_tensors
from tests.support.clone import ROOT
from tests.support.configs import composed
from tests.support.forked import pretrain
from tests.support.hf_folders import (
    convert,
    edit_config,
    random_config,
    read_folder,
    same_bytes,
    write_folder,
)
from tests.support.runs import lines
from tests.support.transformers_models import make_config, make_pair, one_document
from train.checkpoint.load_model import load_model, open_checkpoint
from train.checkpoint.restore import verify
from train.config import load_config
from train.curriculum_stages import build_stages
from train.guard.signals import StopRequest
from train.training_data import build_data

L, S = LayerType.lightning, LayerType.softmax


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("number", [0, 1, 4])
def test_import_and_export_give_back_every_byte(
    number: int, dtype: torch.dtype, layout: Layout, tmp_path: Path
) -> None:
    cfg = random_config(number, slope_rule=SlopeRule(layout))
    tensors = write_folder(tmp_path / "hf", cfg, layout, dtype, files=1 + number)
    assert convert("import", "--hf", tmp_path / "hf", "--output", tmp_path / "c", "--shard-bytes", 9000) == 0
    assert verify(tmp_path / "c") == []
    assert len(list((tmp_path / "c").glob("*.safetensors"))) > 1
    where = ["--checkpoint", tmp_path / "c", "--output", tmp_path / "back", "--layout", layout]
    assert convert("export", *where, "--shard-bytes", 7000) == 0
    assert same_bytes(read_folder(tmp_path / "back"), tensors)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "back"))
    assert before == after
    assert convert("export", *where[:3], tmp_path / "fp32", *where[4:], "--dtype", "fp32") == 0
    assert {tensor.dtype for tensor in read_folder(tmp_path / "fp32").values()} == {torch.float32}
    assert convert("export", *where[:3], tmp_path / "bf16", *where[4:], "--dtype", "bf16") == 0
    wide = {n for n, t in read_folder(tmp_path / "bf16").items() if t.dtype == torch.float32}
    gates = {piece.name for piece in hf_tensors(cfg) if piece.is_gate}
    assert wide == (gates if layout is Layout.text01 else set())


@pytest.mark.parametrize("number", range(5))
def test_transformers_models_come_and_go(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What transformers saves is read, and what is written it loads: the same logits in all three."""
    cfg = random_config(number, hidden_size=44, expert_ffn_size=20)  # 16 bytes, as torch's grouped_mm asks
    _, theirs = make_pair(cfg, seed=number)
    theirs.save_pretrained(tmp_path / "hf")
    with safe_open(tmp_path / "hf/model.safetensors", framework="pt") as file:
        extra = set(file.keys()) - {piece.name for piece in hf_tensors(cfg)}
    assert all(BUFFERS.fullmatch(name) for name in extra)
    assert convert("import", "--hf", tmp_path / "hf", "--output", tmp_path / "c") == 0
    assert convert("export", "--checkpoint", tmp_path / "c", "--output", tmp_path / "back") == 0
    assert "WARNING" not in capsys.readouterr().err
    ids = torch.randint(cfg.vocab_size, (2, 37), generator=torch.Generator().manual_seed(number))
    wanted = theirs(input_ids=ids, use_cache=False).logits
    ours = load_model(open_checkpoint(tmp_path / "c"), device=torch.device("cpu"), dtype=torch.float32)
    torch.testing.assert_close(ours(ids, one_document(2, 37)), wanted, rtol=1e-5, atol=1e-5)
    again, facts = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not facts["unexpected_keys"]
    assert not facts["mismatched_keys"]
    assert all(BUFFERS.fullmatch(name) for name in facts["missing_keys"])
    torch.testing.assert_close(again(input_ids=ids, use_cache=False).logits, wanted, rtol=1e-6, atol=1e-6)


def test_from_transformers_through_a_run_and_back(license_corpus: Path, tmp_path: Path) -> None:
    """Two steps on pp2 tp2 ep2 from an import: the first loss is transformers', which loads the result."""
    sizes = {"num_heads": 4, "num_kv_heads": 2, "num_experts": 4, "hidden_size": 44, "expert_ffn_size": 20}
    cfg = make_config(layer_types=[L, L, L, S], vocab_size=512, **sizes)
    _, theirs = make_pair(cfg, seed=7)
    theirs.save_pretrained(tmp_path / "hf")
    assert convert("import", "--hf", tmp_path / "hf", "--output", tmp_path / "c") == 0
    changes = [
        f"data.sources=[{{path: {license_corpus}}}]", f"run_dir={tmp_path}/run", "train.steps=2",
        f"checkpoint.init={tmp_path}/c", "parallel.pp=2", "parallel.tp=2", "parallel.ep=2",
        "batch.global_tokens=1024", "batch.row_tokens=64", "router.aux_loss_coefficient=0",
    ]  # fmt: skip
    pretrain("conf=debug", *changes, processes=8)
    plain = [change for change in changes if "init" not in change and "parallel" not in change]
    run = load_config(composed("conf=debug", *plain))
    stages = build_stages(replace(run, model=replace(run.model, vocab_size=512)))
    loader, _ = build_data(stages, stages[0], one_process(torch.device("cpu")), StopRequest())
    losses = [
        F.cross_entropy(theirs(input_ids=ids[None], use_cache=False).logits[0], wanted, reduction="none")
        for batch in loader.next_step()
        for row, offsets in enumerate(batch.offsets.tolist())
        for begin, end in pairwise(dict.fromkeys(offsets))
        for ids, wanted in [(batch.tokens[row, begin:end], batch.targets[row, begin:end])]
    ]
    counted = torch.cat([loss[loss != 0] for loss in losses])  # what is no target has loss 0
    first, _ = lines(tmp_path / "run")
    assert first["loss"] == pytest.approx(counted.mean().item(), rel=1e-5)

    assert convert("export", "--checkpoint", tmp_path / "run", "--output", tmp_path / "back") == 0
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    ours = load_model(open_checkpoint(tmp_path / "run"), device=torch.device("cpu"), dtype=torch.float32)
    ids = torch.randint(512, (3, 50))
    reference = after(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(ours(ids, one_document(3, 50)), reference, rtol=1e-5, atol=1e-5)
    assert (reference - theirs(input_ids=ids, use_cache=False).logits).abs().max() > 1e-3  # it has learnt


def test_tokenizer_files_travel(tmp_path: Path) -> None:
    cfg = random_config(1)
    write_folder(tmp_path / "hf", cfg, Layout.transformers, torch.float32)
    train_tokenizer(["some words and others"], size=270).save(str(tmp_path / "hf/tokenizer.json"))
    (tmp_path / "hf/tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert convert("import", "--hf", tmp_path / "hf", "--output", tmp_path / "c") == 0
    assert verify(tmp_path / "c") == []
    assert convert("export", "--checkpoint", tmp_path / "c", "--output", tmp_path / "back") == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    (tmp_path / "c/tokenizer/tokenizer.json").write_text("{}")
    assert "sha256" in verify(tmp_path / "c")[0] or "bytes, expected" in verify(tmp_path / "c")[0]
    assert convert("export", "--checkpoint", tmp_path / "c", "--output", tmp_path / "no") == 2
    assert not (tmp_path / "no").exists()


def test_memory_is_that_of_the_largest_tensor(tmp_path: Path) -> None:
    """160 MB in either direction, the largest tensor 13 MB: the peak grows by less than three of them."""
    cfg = make_config(
        layer_types=[L, L, L, S], num_heads=4, num_kv_heads=2, hidden_size=512, head_dim=128, rotary_dim=128,
        vocab_size=6500, num_experts=4, expert_ffn_size=1024,
    )  # fmt: skip
    tensors = write_folder(tmp_path / "hf", cfg, Layout.transformers, torch.float32)
    largest, total = max(t.nbytes for t in tensors.values()), sum(t.nbytes for t in tensors.values())
    assert total > 9 * largest
    del tensors
    code = (
        "import re, sys\nfrom scripts.convert_hf import main\n"
        "status = lambda: open('/proc/self/status').read()\n"
        "peak = lambda: 1024 * int(re.search('VmHWM:\\\\s+(\\\\d+)', status())[1])\n"
        "before = peak()\nassert main(sys.argv[1:]) == 0\nprint(peak() - before)"
    )
    for arguments in (
        ["import", "--hf", "hf", "--output", "c"],
        ["export", "--checkpoint", "c", "--output", "back"],
    ):
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, timeout=120,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert int(result.stdout) < 3 * largest, f"{arguments[0]}: {result.stdout} of {largest}"


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")


def reshape_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.norm.weight": torch.zeros(3)}, folder / "model.safetensors")


def add_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.extra.weight": torch.zeros(3)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "texts"),
    [
        (drop_tensor, ["has no tensor lm_head.weight"]),
        (reshape_tensor, ["model.norm.weight has shape [3]"]),
        (add_tensor, ["model.extra.weight", "no tensor of the model"]),
        (edit_config("model_type", "llama"), ["config.json: model_type=llama"]),
        (lambda folder: (folder / "config.json").unlink(), ["config.json: not readable"]),
        (lambda folder: (folder / "model.safetensors").unlink(), ["index.json: not found"]),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 50), ["not readable", "copy"]),
    ],
)
def test_bad_folders_are_named(
    damage: Callable[[Path], None], texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "hf", random_config(1), Layout.transformers, torch.float32)
    damage(tmp_path / "hf")
    assert convert("import", "--hf", tmp_path / "hf", "--output", tmp_path / "c") == 2
    said = capsys.readouterr().err
    assert all(text in said for text in texts), said
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_output_that_exists_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "hf", random_config(1), Layout.transformers, torch.float32)
    shutil.copytree(tmp_path / "hf", tmp_path / "c")
    assert convert("import", "--hf", tmp_path / "hf", "--output", tmp_path / "c") == 2
    assert "exists; give another folder" in capsys.readouterr().err
    assert not (tmp_path / "c/manifest.json").exists()


def test_another_slope_rule_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = random_config(4, num_heads=6, num_kv_heads=3, slope_rule=SlopeRule.text01)
    write_folder(tmp_path / "hf", cfg, Layout.text01, torch.float32)
    assert convert("import", "--hf", tmp_path / "hf", "--output", tmp_path / "c") == 0
    assert convert("export", "--checkpoint", tmp_path / "c", "--output", tmp_path / "back") == 2
    assert "use --layout text01" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()
