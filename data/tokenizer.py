"""Tokenizers: train a byte-level BPE, load a tokenizer.json, find its end-of-document token."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

EOS_TOKENS = ("<|endoftext|>", "<end_of_sentence>", "</s>", "<|end_of_text|>")


def tokenizer_file(path: str | Path) -> Path:
    """Return `path` if it names a .json file, else the tokenizer.json of the folder it names."""
    path = Path(path)
    return path if path.suffix == ".json" else path / "tokenizer.json"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a tokenizer.json or its folder; it neither cuts nor pads a text."""
    file = tokenizer_file(path)
    if not file.is_file():
        raise ValueError(
            f"tokenizer {file} not found; name a tokenizer.json or its folder: --tokenizer, or data.tokenizer"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises plain Exception
        raise ValueError(f"{file} is no tokenizer of the tokenizers library: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def eos_id(tokenizer: Tokenizer, *, token: str | None = None) -> int:
    """Return the id of the token that ends a document: `token`, or the first of EOS_TOKENS there is."""
    names = [token] if token else EOS_TOKENS
    ids = [tokenizer.token_to_id(name) for name in names]
    found = next((i for i in ids if i is not None), None)
    if found is None:
        raise ValueError(
            f"the tokenizer has none of {', '.join(names)}; name its end of a document: --eos-token"
        )
    return found


def vocab_size(tokenizer: Tokenizer) -> int:
    """Return one more than the largest id; vocabularies with gaps hold fewer tokens than that."""
    return max(tokenizer.get_vocab().values()) + 1


def train_tokenizer(texts: Iterable[str], *, size: int) -> Tokenizer:
    """Train a byte-level BPE of at most `size` tokens; the same texts give the same tokenizer."""
    smallest = 1 + len(pre_tokenizers.ByteLevel.alphabet())
    if size < smallest:
        raise ValueError(f"--train-tokenizer {size} must be >= {smallest}: all bytes and {EOS_TOKENS[0]}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[EOS_TOKENS[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
