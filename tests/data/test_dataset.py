import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from data.dataset import DatasetWriter, TokenDataset

DOCUMENTS = [[1, 2, 3, 0], [4, 0], [], [5, 6, 7, 8, 9, 0]]


def write(prefix: Path, documents: list[list[int]], *, vocab_size: int = 100) -> None:
    with DatasetWriter(prefix, vocab_size=vocab_size, eos_id=0, source="test") as writer:
        for document in documents:
            writer.add(np.array(document, np.int64))


def read(dataset: TokenDataset, document: int) -> list[int]:
    out = np.empty(dataset.document_lengths[document], np.int64)
    dataset.read(document, 0, out)
    return out.tolist()


def read_all(dataset: TokenDataset) -> list[list[int]]:
    return [read(dataset, document) for document in range(dataset.num_documents)]


@given(st.lists(st.lists(st.integers(0, 65_000), max_size=9), max_size=9), st.sampled_from([65_001, 70_000]))
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], vocab_size: int
) -> None:
    prefix = tmp_path_factory.mktemp("d") / "tokens"
    write(prefix, documents, vocab_size=vocab_size)
    dataset = TokenDataset(prefix)
    assert read_all(dataset) == documents
    assert dataset.document_lengths.tolist() == list(map(len, documents))
    assert dataset.document_lengths.dtype == np.int64
    assert (dataset.num_documents, dataset.num_tokens) == (len(documents), sum(map(len, documents)))


def test_part_of_a_document_is_read_and_nothing_beyond_it(tmp_path: Path) -> None:
    write(tmp_path / "d", DOCUMENTS)
    dataset, out = TokenDataset(tmp_path / "d"), np.full(4, -1)
    dataset.read(3, 2, out[1:3])
    assert out.tolist() == [-1, 7, 8, -1]
    with pytest.raises(AssertionError):
        dataset.read(0, 1, out)


@pytest.mark.parametrize("vocab_size", [100, 70_000])
def test_megatron_reads_our_files(tmp_path: Path, vocab_size: int) -> None:
    write(tmp_path / "d", DOCUMENTS, vocab_size=vocab_size)
    theirs = IndexedDataset(str(tmp_path / "d"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert theirs.index.dtype == (np.uint16 if vocab_size == 100 else np.int32)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("multimodal", [False, True])
def test_we_read_megatrons_files(tmp_path: Path, dtype: type, multimodal: bool) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=dtype, multimodal=multimodal)
    for sentences in ([[1, 2, 3], [4]], [[5]], [[], [6, 7]]):
        for sentence in sentences:
            builder.add_item(torch.tensor(sentence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(tmp_path / "d.idx"))
    dataset = TokenDataset(tmp_path / "d")
    assert dataset.manifest is None
    assert read_all(dataset) == [[1, 2, 3, 4], [5], [6, 7]]


def test_manifest_describes_the_files(tmp_path: Path) -> None:
    (tmp_path / "some.json").write_text('{"a": 1}')
    with DatasetWriter(
        tmp_path / "d", vocab_size=100, eos_id=0, tokenizer_file=tmp_path / "some.json", source="a b"
    ) as writer:
        writer.add(np.array([42, 0]))
    manifest = TokenDataset(tmp_path / "d").manifest
    assert manifest is not None
    assert manifest == json.loads((tmp_path / "d.json").read_text())
    expected = {"format": 1, "documents": 1, "tokens": 2, "max_token_id": 42, "vocab_size": 100, "eos_id": 0}
    assert manifest.items() >= (expected | {"dtype": "uint16", "source": "a b"}).items()
    for key, name in (("bin", "d.bin"), ("idx", "d.idx"), ("tokenizer", "d.tokenizer.json")):
        data = (tmp_path / name).read_bytes()
        assert manifest[key]["bytes"] == len(data)
        assert manifest[key]["sha256"] == hashlib.sha256(data).hexdigest()
    assert manifest["tokenizer"]["file"] == "d.tokenizer.json"


def test_fingerprint_is_of_the_content_not_the_place(tmp_path: Path) -> None:
    for name, documents in (("a", [[1, 2], [3]]), ("b", [[1, 2], [3]]), ("c", [[1], [2, 3]])):
        write(tmp_path / name, documents)
    a, b, c = (TokenDataset(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c


def test_changed_byte_in_a_sampled_block_is_noticed(tmp_path: Path) -> None:
    tokens = np.arange(1_000_000) % 100
    with DatasetWriter(tmp_path / "d", vocab_size=100) as writer:
        writer.add(tokens)
    fingerprint, size = TokenDataset(tmp_path / "d").fingerprint, 2 * len(tokens)
    for manifest in (True, False):
        for place in (0, (size - 4096) * 7 // 63 + 4095, size - 1):
            with (tmp_path / "d.bin").open("r+b") as file:
                file.seek(place)
                byte = file.read(1)
                file.seek(place)
                file.write(bytes([byte[0] ^ 1]))
                file.flush()
                if manifest:
                    with pytest.raises(ValueError, match=rf"d\.bin or \.idx has changed.*{fingerprint}"):
                        TokenDataset(tmp_path / "d")
                else:
                    assert TokenDataset(tmp_path / "d").fingerprint != fingerprint
                file.seek(place)
                file.write(byte)
        (tmp_path / "d.json").unlink(missing_ok=True)


def test_crash_while_writing_leaves_the_old_files_and_no_others(tmp_path: Path) -> None:
    write(tmp_path / "d", DOCUMENTS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted() -> None:
        with DatasetWriter(tmp_path / "d", vocab_size=100) as writer:
            writer.add(np.array([1]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("token", [-1, 100, 65_536])
def test_writer_refuses_ids_outside_the_vocabulary(tmp_path: Path, token: int) -> None:
    with (
        pytest.raises(ValueError, match=rf"document 0 has token ids .*{token}.* vocab_size=100"),
        DatasetWriter(tmp_path / "d", vocab_size=100) as writer,
    ):
        writer.add(np.array([5, token]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_missing_file_is_named_with_the_remedy(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "d", DOCUMENTS)
    (tmp_path / f"d.{suffix}").unlink()
    with pytest.raises(
        ValueError, match=rf"d\.{suffix} not found.*scripts/prepare_data\.py .*--output {tmp_path}/d"
    ):
        TokenDataset(tmp_path / "d")


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize(("change", "actual"), [(-2, 22), (2, 26), (-24, 0)])
def test_bin_of_wrong_size_is_refused(tmp_path: Path, change: int, actual: int, manifest: bool) -> None:
    write(tmp_path / "d", DOCUMENTS)
    data = (tmp_path / "d.bin").read_bytes()
    (tmp_path / "d.bin").write_bytes(data[: len(data) + change] if change < 0 else data + bytes(change))
    if not manifest:
        (tmp_path / "d.json").unlink()
    with pytest.raises(ValueError, match=rf"d\.bin has {actual} bytes, .* 12 tokens = 24 bytes"):
        TokenDataset(tmp_path / "d")


def corrupt(prefix: Path, offset: int, data: bytes) -> None:
    with Path(f"{prefix}.idx").open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"GGUF", r"d\.idx starts with b'GGUF.*no Megatron token index"),
        (9, b"\x02", r"d\.idx has version 2 "),
        (17, b"\x07", r"d\.idx has .* token type code 7; .*\[1, 2, 3, 4, 5, 8\]"),
        (18, b"\x05", r"d\.idx has 122 bytes, expected 134; the file is truncated"),
        (34, struct.pack("<i", 2), "contradict each other"),  # a length
        (34, struct.pack("<ii", -4, 10), "contradict each other"),
        (34 + 16, struct.pack("<q", 2), "contradict each other"),  # a pointer
        (34 + 48, struct.pack("<q", 1), "contradict each other"),  # the first document
        (34 + 48 + 8, struct.pack("<q", 3), "contradict each other"),  # documents out of order
        (34 + 48 + 32, struct.pack("<q", 3), "contradict each other"),  # a sequence after the last document
    ],
)
def test_corrupt_index_is_refused(tmp_path: Path, offset: int, data: bytes, message: str) -> None:
    write(tmp_path / "d", DOCUMENTS)
    corrupt(tmp_path / "d", offset, data)
    with pytest.raises(ValueError, match=message):
        TokenDataset(tmp_path / "d")


@pytest.mark.parametrize(("size", "expected"), [(0, 34), (20, 34), (40, 122), (121, 122)])
def test_truncated_index_is_refused(tmp_path: Path, size: int, expected: int) -> None:
    write(tmp_path / "d", DOCUMENTS)
    (tmp_path / "d.idx").write_bytes((tmp_path / "d.idx").read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"d\.idx has {size} bytes, .*{expected}; the file is truncated"):
        TokenDataset(tmp_path / "d")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"d\.json is no manifest"),
        ("[]", r"d\.json is no manifest"),
        ('{"format": 1}', r"d\.json is no manifest .*'bin'"),
        (
            '{"format": 1, "bin": {"bytes": 26}, "idx": {"bytes": 122}}',
            r"d\.json states .*\(1, 26, 122\).*\(1, 24, 122\)",
        ),
    ],
)
def test_wrong_manifest_is_refused(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "d", DOCUMENTS)
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        TokenDataset(tmp_path / "d")
