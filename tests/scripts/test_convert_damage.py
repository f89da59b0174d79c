"""Conversion of what is damaged, wrong or has no room: one line, code 2, and nothing half done."""

import json
import math
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.hf.config import Layout
from tests.support.hf_folders import (
    convert,
    edit_config,
    random_config,
    read_folder,
    same_bytes,
    write_folder,
)
from train.checkpoint.tensor_file import TensorFileWriter


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda folder: os.truncate(folder / "model.safetensors", 999), "model.safetensors: not readable"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json: not readable"),
        (edit_config("tie_word_embeddings", True), "tie_word_embeddings=True: this model has only"),
        (edit_config("num_hidden_layers", -1), "num_hidden_layers=-1 must be an integer, at least 1"),
        (edit_config("num_attention_heads", 0), "num_attention_heads=0 must be an integer, at least 1"),
        (edit_config("head_dim", "16"), "head_dim='16' must be an integer"),
        (edit_config("rms_norm_eps", math.nan), "rms_norm_eps=nan must be a finite number"),
        (edit_config("model_type", ["minimax"]), "model_type=['minimax']"),
        (edit_config("rotary_dim", [4]), "rotary_dim=[4] must be an integer"),
        (edit_config("rope_parameters", "x"), "rope_parameters='x' must be an object"),
        (edit_config("partial_rotary_factor", "half"), "partial_rotary_factor='half' must be a finite"),
    ],
)
def test_a_wrong_folder_is_named(
    damage: Callable[[Path], None], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "hf", random_config(1), Layout.transformers, torch.float32)
    damage(tmp_path / "hf")
    assert convert("import", "--hf", tmp_path / "hf", "--output", tmp_path / "c") == 2
    said = capsys.readouterr().err
    assert text in said, said
    assert len(said.splitlines()) == 1, said
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        ({"lm_head.weight": ...}, "holds lm_head.weight (one of 1), which model.safetensors.index.json does"),
        ({"model.extra.weight": "model-0.safetensors"}, "model-0.safetensors: has no tensor model.extra"),
        ({"lm_head.weight": "model-7.safetensors"}, "model-7.safetensors: not readable"),
        ({"lm_head.weight": "../model.safetensors"}, "names '../model.safetensors', which is not a file"),
        ({"lm_head.weight": None}, "names None, which is not a file"),
        ({"lm_head.weight": ".."}, "names '..', which is not a file"),
    ],
)
def test_a_wrong_index_is_named(
    edit: dict[str, Any], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "hf", random_config(1), Layout.transformers, torch.float32, files=3)
    index = tmp_path / "hf/model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"] | edit
    kept = {name: place for name, place in places.items() if place is not ...}
    index.write_text(json.dumps({"weight_map": kept}))
    assert convert("import", "--hf", tmp_path / "hf", "--output", tmp_path / "c") == 2
    said = capsys.readouterr().err
    assert text in said, said
    assert len(said.splitlines()) == 1, said
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def flip_a_byte(checkpoint: Path) -> None:
    file = next(checkpoint.glob("*.safetensors"))
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize(
    ("damage", "arguments", "text"),
    [
        (flip_a_byte, [], "safetensors: sha256"),
        (lambda c: os.truncate(next(c.glob("*.safetensors")), 999), [], "999 bytes, expected"),
        (lambda c: next(c.glob("*.safetensors")).unlink(), [], "rank-00000.safetensors"),
        (lambda c: (c.parent / "out").symlink_to("nowhere"), [], "out: exists; give another folder"),
        (lambda c: (c.parent / "out").mkdir(), [], "out: exists; give another folder"),
        (lambda c: None, ["--shard-bytes", 0], "--shard-bytes 0 must be at least 1"),
        (lambda c: None, ["--tokenizer", "nowhere"], "tokenizer nowhere/tokenizer.json not found"),
        (lambda c: None, ["--output", "{tmp}/c/hf/out"], "hf/out: lies inside the checkpoint"),
        (lambda c: None, ["--output", "{tmp}/hf/config.json/out"], "Not a directory"),
    ],
)
def test_an_export_that_cannot_be_is_none(
    damage: Callable[[Path], None], arguments: list[object], text: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write_folder(tmp_path / "hf", random_config(1), Layout.transformers, torch.float32)
    assert convert("import", "--hf", tmp_path / "hf", "--output", tmp_path / "c") == 0
    damage(tmp_path / "c")
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    given = [str(word).format(tmp=tmp_path) for word in arguments]
    assert convert("export", "--checkpoint", tmp_path / "c", "--output", tmp_path / "out", *given) == 2
    said = capsys.readouterr().err
    assert text in said, said
    assert len(said.splitlines()) == 1, said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known before the first byte, or, as here by a limit on files, found on the way."""
    write_folder(tmp_path / "hf", random_config(1), Layout.transformers, torch.float32)
    assert convert("import", "--hf", tmp_path / "hf", "--output", tmp_path / "c") == 0
    capsys.readouterr()
    export = ["export", "--checkpoint", tmp_path / "c", "--output", tmp_path / "out"]
    usual, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        assert convert(*export) == 2
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, usual)
    monkeypatch.setattr("scripts.convert_hf.free_bytes", lambda folder: 2**17)
    assert convert(*export) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "File too large" in first
    assert "out: No space left: need 0.000166 GiB, have 0.000122" in second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "hf"]


def test_a_killed_export_looks_like_none_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = write_folder(tmp_path / "hf", random_config(1), Layout.transformers, torch.float32)
    assert convert("import", "--hf", tmp_path / "hf", "--output", tmp_path / "c") == 0
    export = ["export", "--checkpoint", tmp_path / "c", "--output", tmp_path / "out", "--shard-bytes", 9000]
    child = os.fork()
    if child == 0:  # dies when the first file is complete
        monkeypatch.setattr(
            TensorFileWriter, "facts", property(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        )
        os._exit(convert(*export))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-out", "c", "hf"]
    assert not (tmp_path / ".tmp-out/model.safetensors.index.json").exists()
    assert convert(*export) == 0
    assert same_bytes(read_folder(tmp_path / "out"), tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "hf", "out"]


def test_partial_rotary_is_said_in_the_export_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = random_config(3, num_heads=4, num_kv_heads=2, head_dim=16, rotary_dim=8)  # softmax alone
    write_folder(tmp_path / "hf", cfg, Layout.transformers, torch.float32)
    assert convert("import", "--hf", tmp_path / "hf", "--output", tmp_path / "c") == 0
    capsys.readouterr()
    for layout, is_loud in ((Layout.transformers, True), (Layout.text01, False)):
        arguments = ["--checkpoint", tmp_path / "c", "--output", tmp_path / layout, "--layout", layout]
        assert convert("export", *arguments) == 0
        said, about = capsys.readouterr().err, (tmp_path / layout / "README.md").read_text()
        for text in (said, about):
            assert ("WARNING: config.json: rotary_dim=8 of head_dim=16: transformers" in text) == is_loud
            assert ("Use --layout text01, or train with model.rotary_dim" in text) == is_loud
    config = json.loads((tmp_path / "transformers/config.json").read_text())
    assert config["rotary_dim"] == 8
    assert config["rope_parameters"]["partial_rotary_factor"] == 0.5
