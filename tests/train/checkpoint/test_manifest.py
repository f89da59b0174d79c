"""A manifest is read as a stranger's: whatever stands in it, one CheckpointError comes out, or the truth."""

import copy
import os
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.checkpoints import FACTS, VALUES, content_of, make, write
from train.checkpoint.manifest import MAX_BYTES, Manifest, StoredBox, _tile, read_manifest
from train.checkpoint.restore import Verify, read_boxes, verify
from train.checkpoint.storage import Box, CheckpointError


def read_all(folder: Path, *, is_checked: bool = True) -> Manifest:
    """Read everything; what comes must be what was written."""
    manifest = read_manifest(folder, is_checked=is_checked)
    boxes = {"w": Box(torch.zeros(6, 4), (6, 4), (0, 0)), "b": Box(torch.zeros(5), (5,), (0,)),
             "s": Box(torch.zeros(()), (), ())}  # fmt: skip
    read_boxes(manifest, boxes)
    assert torch.equal(boxes["w"].tensor, VALUES)
    assert torch.equal(boxes["b"].tensor, torch.ones(5))
    assert boxes["s"].tensor == 7
    return manifest


def test_what_was_written_is_read(tmp_path: Path) -> None:
    folder = make(tmp_path)
    manifest = read_all(folder)
    assert manifest.step == 3
    assert manifest.part("config") == FACTS["config"]
    assert verify(folder) == []


def part(content: dict[str, Any], number: int = 0) -> dict[str, Any]:
    return content["tensors"]["w"]["parts"][number]


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "file outside": (lambda c: part(c).update(file="../secret"), "'../secret', which no rank writes"),
    "absolute file": (lambda c: part(c).update(file="/etc/passwd"), "which no rank writes"),
    "other digits": (lambda c: part(c).update(file="rank-0000\u0660.safetensors"), "which no rank writes"),
    "file without hash": (lambda c: part(c).update(file="rank-00009.safetensors"), "no hash is kept"),
    "named outside": (lambda c: c["files"].update({"../x": {}}), "names '../x', which nobody writes"),
    "size": (lambda c: c["files"]["rank-00000.safetensors"].update(size=-1), "not an integer"),
    "hash": (lambda c: c["files"]["rank-00000.safetensors"].update(sha256="0"), "no hash"),
    "no files": (lambda c: c.pop("files"), "files is None"),
    "gap": (lambda c: part(c, 1).update(offset=[3, 0], shape=[3, 4]), "leave a gap"),
    "overlap": (lambda c: part(c, 1).update(offset=[1, 0], shape=[5, 4]), "a gap in its shape [6, 4], or"),
    "overlap and gap": (lambda c: part(c, 1).update(offset=[0, 0]), "leave a gap"),
    "outside": (lambda c: part(c).update(offset=[5, 0]), "is not inside [6, 4]"),
    "rank": (lambda c: part(c).update(offset=[0]), "is not inside"),
    "absurd shape": (lambda c: c["tensors"]["w"].update(shape=[2**53, 2**53]), "more than"),
    "absurd size": (lambda c: c["tensors"]["w"].update(shape=[10**4000, 4]), "not an integer from 0 to"),
    "negative": (lambda c: c["tensors"]["w"].update(shape=[-6, -4]), "not an integer from 0 to"),
    "bool": (lambda c: c["tensors"]["b"].update(shape=[True]), "has True, not an integer"),
    "float": (lambda c: c["tensors"]["b"].update(shape=[5.0]), "has 5.0, not an integer"),
    "dims": (lambda c: c["tensors"]["b"].update(shape=[1] * 99), "a list of up to 4"),
    "dtype": (lambda c: c["tensors"]["b"].update(dtype="OBJECT"), "'OBJECT', not one of"),
    "twice": (lambda c: part(c, 1).update(file=part(c)["file"]), "name a file twice"),
    "tensor name": (lambda c: c["tensors"].update({"\x1b[2J": c["tensors"]["b"]}), r"\x1b[2J': only"),
    "tensors": (lambda c: c.update(tensors=[]), "tensors is [], not an object"),
    "step": (lambda c: c.update(step="3"), "step has '3'"),
    "format": (lambda c: c.update(format=2), "format 2, this version reads 1"),
    "NaN": (lambda c: c.update(x=float("nan")), "NaN is no number"),
    "infinity": (lambda c: c.update(x=float("-inf")), "-Infinity is no number"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), EDITS.values(), ids=EDITS)
def test_nonsense_is_refused(edit: Callable[[dict[str, Any]], object], message: str, tmp_path: Path) -> None:
    folder = make(tmp_path)
    content = content_of(folder)
    edit(content)
    write(folder, content)
    with pytest.raises(CheckpointError) as caught:
        read_manifest(folder)
    assert str(caught.value).startswith(f"{folder}/manifest.json: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not readable"),
        (b"[1]", "holds [1], not an object"),
        (b'{"format": 1, "format": 1}', "key 'format' stands twice"),
        (b'{"format": 1e999}', "1e999 is no number"),
        (b'{"format": "\xff"}', "invalid start byte"),
        (b"[" * 10**6, "nested too deeply"),
        (b'{"a":' * 10**5, "nested too deeply"),
        (b"1" * 10**5, "Exceeds the limit"),
        (b'{"format": 1}', "holds no hashes"),
    ],
    ids=lambda value: value[:12].decode(errors="replace") if isinstance(value, bytes) else "",
)
def test_text_that_is_no_manifest(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(CheckpointError) as caught:
        read_manifest(tmp_path)
    assert message in str(caught.value)


def test_too_long_a_manifest_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse
    with pytest.raises(CheckpointError, match="at most"):
        read_manifest(tmp_path)


def test_links_and_pipes_are_not_opened(tmp_path: Path) -> None:
    """A pipe would wait for ever, a link shows a file of somewhere else."""
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(CheckpointError, match="no regular file"):
        read_manifest(tmp_path)
    folder = make(tmp_path)
    shard = folder / "rank-00001.safetensors"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    assert verify(folder) == [f"{shard}: is no regular file; it was not opened"]
    with pytest.raises(CheckpointError, match="no regular file"):
        read_all(folder)


def test_tiles() -> None:
    """Against counting every element, over random boxes."""
    rng, found = random.Random(1), {True: 0, False: 0}
    for _ in range(3000):
        whole = tuple(rng.randint(0, 3) for _ in range(rng.randint(0, 3)))
        boxes = [_box(rng, whole) for _ in range(rng.randint(0, 4))]
        if rng.random() < 0.5 and whole:  # cut it in two: a tiling
            dim = rng.randrange(len(whole))
            at = rng.randint(0, whole[dim])
            first, second = ((*whole[:dim], size, *whole[dim + 1 :]) for size in (at, whole[dim] - at))
            origin = (0,) * len(whole)
            boxes = [(origin, first), ((*origin[:dim], at, *origin[dim + 1 :]), second)]
        counts = torch.zeros(whole)
        for offset, shape in boxes:
            counts[tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))] += 1
        is_tiled = bool((counts == 1).all())
        if len(boxes) == 1:  # must be the whole, even where it is empty
            is_tiled = boxes[0][1] == whole
        assert _tile(whole, tuple(StoredBox("", *box) for box in boxes)) == is_tiled, (whole, boxes)
        found[is_tiled] += 1
    assert min(found.values()) > 500


def _box(rng: random.Random, whole: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    offset = tuple(rng.randint(0, size) for size in whole)
    return offset, tuple(rng.randint(0, size - at) for size, at in zip(whole, offset, strict=True))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


STRANGE: list[Any] = [
    None, True, -1, 0, 1, 3, 2**31, 2**53, 2**64, 10**300, -(10**300), 0.5,
    1e308, "", "../x", "w", "/", "\0", "\ud800",
    [], [[]], {}, {"": ""}, [0, 0], [6, 4], [2**40, 2**40], "rank-00001.safetensors", "F32", "a" * 10000,
]  # fmt: skip


def mutate(rng: random.Random, content: dict[str, Any]) -> None:
    for _ in range(rng.choice([1, 1, 2, 5])):
        container, key = rng.choice(list(places(content)))
        match rng.randrange(5):
            case 0:
                container[key] = copy.deepcopy(rng.choice(STRANGE))
            case 1:
                del container[key]
            case 2:
                other, where = rng.choice(list(places(content)))
                container[key] = copy.deepcopy(other[where])
            case 3 if isinstance(container, dict) and len(container) < 50:
                container[rng.choice(["", "x", "../x", "w", "rank-00007.safetensors", "é"])] = container[key]
            case 4:
                for _ in range(rng.choice([1, 3, 30])):
                    container[key] = [container[key]]


@pytest.mark.parametrize("is_checked", [True, False], ids=["checked", "verify=off"])
def test_fuzz_structure(is_checked: bool, tmp_path: Path) -> None:
    """2000 mutations with the right checksum: an error of ours, or exactly the tensors that were written."""
    folder = make(tmp_path)
    original = content_of(folder)
    read, refused = 0, dict[int, str]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(2000):
        rng = random.Random(seed)
        content = copy.deepcopy(original)
        try:
            mutate(rng, content)
            write(folder, content)
        except IndexError:
            continue  # nothing left to change
        try:
            read_all(folder, is_checked=is_checked)
            read += 1
        except CheckpointError as error:
            refused[seed] = str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB
    assert not {seed for seed, error in refused.items() if "\n" in error}
    assert min(read, len(refused)) > 200, (read, len(refused))


def test_fuzz_bytes(tmp_path: Path) -> None:
    """Flips and cuts of the text: an error, or what was written (white space)."""
    folder = make(tmp_path)
    path = folder / "manifest.json"
    original = path.read_bytes()
    errors = 0
    for seed in range(2000):
        rng = random.Random(seed)
        text = bytearray(original)
        for _ in range(rng.choice([1, 3])):
            text[rng.randrange(len(text))] = rng.randrange(256)
        path.write_bytes(text[: rng.randrange(len(text))] if seed % 4 == 0 else text)
        try:
            read_all(folder)
        except CheckpointError:
            errors += 1
    assert errors > 1500


def test_fuzz_headers(tmp_path: Path) -> None:
    """A safetensors file that is not what the manifest says is found before anything is allocated."""
    folder = make(tmp_path)
    path = folder / "rank-00000.safetensors"
    original = path.read_bytes()
    length = int.from_bytes(original[:8], "little")
    for seed in range(800):
        rng = random.Random(seed)
        header = bytearray(original[: 8 + length])
        header[rng.randrange(len(header))] = rng.randrange(256)
        content = bytes(header) + original[8 + length :]
        path.write_bytes(content)
        problems = verify(folder, Verify.size)
        try:
            read_all(folder)
        except CheckpointError:
            assert problems or header != original[: 8 + length], seed
            continue
        assert len(verify(folder)) == (content != original)  # the hash sees what changed nothing


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w": VALUES[:2], "b": torch.ones(5), "x": torch.ones(1)}, "header has also tensor 'x'"),
        ({"w": VALUES[:2]}, "header lacks tensor 'b'"),
        ({"w": VALUES[:3], "b": torch.ones(5)}, "header: w is ('F32', [3, 4])"),
        ({"w": VALUES[:2].int(), "b": torch.ones(5)}, "header: w is ('I32', [2, 4])"),
    ],
    ids=["more", "less", "shape", "dtype"],
)
def test_a_header_must_agree(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    folder = make(tmp_path)
    path = folder / "rank-00000.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    content = content_of(folder)
    content["files"][path.name]["size"] = path.stat().st_size
    write(folder, content)
    (problem,) = verify(folder, Verify.size)
    assert problem.startswith(f"{path}: {message}")


def test_bytes_that_belong_to_no_tensor_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path)
    path = folder / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes() + b"more")
    content = content_of(folder)
    content["files"][path.name]["size"] += 4
    write(folder, content)
    (problem,) = verify(folder, Verify.size)
    assert problem.startswith(f"{path}: Error while deserializing header: ")
    assert "file not fully covered" in problem


def test_a_pickle_in_the_folder_is_named_and_never_run(tmp_path: Path) -> None:
    folder = make(tmp_path)
    mark = tmp_path / "executed"
    evil = f"cos\nsystem\n(S'touch {mark}'\ntR.".encode()  # the opcodes of os.system("touch ...")
    for name in ("optimizer.pt", "data.pkl"):
        (folder / name).write_bytes(evil)
    assert verify(folder) == [
        f"{folder}/{name}: the manifest does not name it; it was not opened; take it away"
        for name in ("data.pkl", "optimizer.pt")
    ]
    for name in ("data.pkl", "optimizer.pt"):
        (folder / name).unlink()
    (folder / "rank-00000.safetensors").write_bytes(evil)  # under the name of a file that is opened
    content = content_of(folder)
    content["files"]["rank-00000.safetensors"]["size"] = len(evil)
    write(folder, content)
    (problem,) = verify(folder)
    assert "header too large" in problem
    with pytest.raises(CheckpointError, match="not readable"):
        read_all(folder)
    assert not mark.exists()
