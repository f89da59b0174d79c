"""Our safetensors files are what the library reads, and what it would have hashed."""

import hashlib
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from train.checkpoint.tensor_file import TensorFileWriter, by_alignment, header_bytes


def tensors() -> dict[str, Tensor]:
    """Odd counts of narrow dtypes before wide ones, a scalar, nothing, and a view that is not contiguous."""
    torch.manual_seed(0)
    return {
        "half": torch.randn(3).to(torch.float16),
        "brain": torch.randn(5, 7).to(torch.bfloat16),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "turned": torch.randn(4, 6).T[1:, ::2],
        "größe": torch.randn(2, 1, 3),
    }


def write(path: Path, values: dict[str, Tensor]) -> TensorFileWriter:
    outlines = {name: tensor.to("meta") for name, tensor in values.items()}
    with TensorFileWriter(path, outlines) as writer:
        for name in by_alignment(outlines):
            writer.write(values[name])
    return writer


def test_the_library_reads_every_tensor(tmp_path: Path) -> None:
    values, path = tensors(), tmp_path / "a.safetensors"
    facts = write(path, values).facts
    found = load_file(path)
    assert found.keys() == values.keys()
    for name, tensor in values.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(path, framework="pt") as file:  # slices are mapped: they need aligned tensors
        assert torch.equal(file.get_slice("brain")[1:3, 2:], values["brain"][1:3, 2:])
    content = path.read_bytes()
    assert facts == (len(content), hashlib.sha256(content).hexdigest())
    assert int.from_bytes(content[:8], "little") % 8 == 0


def test_a_tensor_may_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As conversion writes it; and chunks smaller than a tensor change nothing."""
    values = {"b": torch.arange(10.0), "a": torch.arange(7).to(torch.bfloat16)}
    whole = write(tmp_path / "whole", values).facts
    monkeypatch.setattr("train.checkpoint.tensor_file.CHUNK", 3)
    with TensorFileWriter(tmp_path / "parts", values) as writer:
        data = values["b"].numpy().tobytes()
        writer.write(data[:9])
        writer.write(memoryview(data)[9:])
        writer.write(values["a"])
    assert writer.facts == whole
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_no_tensors_is_a_file(tmp_path: Path) -> None:
    assert write(tmp_path / "none", {}).size == (tmp_path / "none").stat().st_size
    assert load_file(tmp_path / "none") == {}


def test_a_dtype_that_no_checkpoint_has() -> None:
    with pytest.raises(ValueError, match=r"x is torch.int64; a checkpoint holds torch.float32, "):
        header_bytes({"x": torch.zeros(1, dtype=torch.int64)})


def test_less_than_was_said_is_an_error(tmp_path: Path) -> None:
    path, planned = tmp_path / "short", {"x": torch.zeros(4)}
    with pytest.raises(AssertionError, match="bytes of"), TensorFileWriter(path, planned) as writer:
        writer.write(torch.zeros(3))


def test_nothing_is_written_over(tmp_path: Path) -> None:
    write(tmp_path / "a", {})
    with pytest.raises(FileExistsError):
        write(tmp_path / "a", {})


def test_a_disk_error_names_the_file(tmp_path: Path) -> None:
    """A limit of the process stops the file in the middle of a tensor."""
    path, limits = tmp_path / "long", resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{path}'"):
            write(path, {"x": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert path.stat().st_size == 1000
