from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from data.tokenizer import EOS_TOKENS, eos_id, load_tokenizer, tokenizer_file, train_tokenizer, vocab_size

TEXTS = ["the cat sat on the mat\n", "der Kater saß auf der Matte: ☃ 42\t"] * 20


def test_training_is_deterministic_and_any_text_survives() -> None:
    first, second = (train_tokenizer(iter(TEXTS), size=280) for _ in range(2))
    assert first.to_str() == second.to_str()
    assert vocab_size(first) == 280
    assert eos_id(first) == 0
    assert first.id_to_token(0) == "<|endoftext|>"
    for text in [*TEXTS, "  new\r\n\x00 ünïcödé 漢字 🙂"]:
        assert first.decode(first.encode(text).ids) == text


def test_file_and_folder_load_alike_and_nothing_is_cut_or_padded(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, size=300)
    whole = tokenizer.encode(TEXTS[0]).ids
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=500)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(path).encode(TEXTS[0]).ids == whole
        assert tokenizer_file(path) == tmp_path / "tokenizer.json"


def test_missing_and_broken_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"tokenizer {tmp_path}/none/tokenizer\.json not found"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"{tmp_path}/tokenizer\.json is no tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", EOS_TOKENS)
def test_usual_end_of_document_tokens_are_found(name: str) -> None:
    assert eos_id(Tokenizer(models.WordLevel({"a": 0, name: 1}, unk_token="a"))) == 1


def test_end_of_document_token_can_be_given_and_must_exist() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "[END]": 7}, unk_token="a"))
    assert eos_id(tokenizer, token="[END]") == 7
    assert vocab_size(tokenizer) == 8
    with pytest.raises(ValueError, match=r"none of <eod>; .*--eos-token"):
        eos_id(tokenizer, token="<eod>")


def test_vocabulary_without_room_for_all_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--train-tokenizer 256 must be >= 257"):
        train_tokenizer(TEXTS, size=256)
