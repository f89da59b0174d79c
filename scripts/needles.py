"""Write token files of texts with hidden facts, to train on before `scripts/evaluate.py niah`.

Texts and questions are English sentences, so any tokenizer will do; lengths are counted in its tokens.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # import from the repository root, not from scripts/

import argparse
import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data.dataset import DatasetWriter
from data.tokenizer import EOS_TOKENS, eos_id, load_tokenizer, vocab_size

Encode = Callable[[str], list[int]]

if TYPE_CHECKING:
    from tokenizers import Tokenizer

KEYS = [
    "Athens", "Berlin", "Cairo", "Delhi", "Havana", "Kyoto", "Lagos", "Lima", "London", "Madrid", "Oslo",
    "Paris", "Prague", "Rome", "Seoul", "Tokyo",
]  # fmt: skip
VALUES = [str(number) for number in range(10, 50)]
SHORTEST = 24
"""Document to train on: short ones are easy, and teach what long ones need."""
FACT, QUESTION = " Flight {key} {value} is on time.", " Flight {key}"
SENTENCES = [
    " The grass is green and the sky is blue.",
    " A small boat drifts slowly down the river.",
    " In the morning they walk to the market.",
    " Rain fell on the old stone bridge all day.",
    " The baker sells warm bread near the square.",
    " Two birds sit on the wire above the road.",
    " She reads a long letter by the open window.",
    " The train to the coast leaves in an hour.",
    " Children play with a red ball in the yard.",
    " At night the wind moves the tall trees.",
]


class Task(NamedTuple):
    """A prompt that ends with a question, and its answer."""

    prompt: list[int]
    answer: list[int]


def make_task(
    encode: Encode, sentences: Sequence[str], draw: np.random.Generator, *, tokens: int, depth: float,
    distractors: int,
) -> Task:  # fmt: skip
    """Hide a fact in a text and ask for it.

    Args:
        encode: token ids of a text.
        sentences: what the text consists of, taken in random order.
        draw: source of all random choices.
        tokens: length of the whole, question and answer included.
        depth: 0 = the needle comes first, 1 = just before the question.
        distractors: facts about other keys, anywhere.

    Raises:
        ValueError: the facts and the question alone are longer.
    """
    keys = draw.permutation(KEYS)[: 1 + distractors]
    values = draw.permutation(VALUES)[: 1 + distractors]
    facts = [encode(FACT.format(key=key, value=value)) for key, value in zip(keys, values, strict=True)]
    question, answer = encode(QUESTION.format(key=keys[0])), encode(f" {values[0]}")
    room = tokens - sum(map(len, [*facts, question, answer]))
    if room < 0:
        raise ValueError(
            f"{tokens} tokens do not hold {len(facts)} facts, question and answer; {-room} more do"
        )
    hay = fill(encode, sentences, draw, room)
    ends = np.cumsum([0, *map(len, hay)])
    places = [int(np.abs(ends - depth * room).argmin()), *draw.integers(len(ends), size=distractors).tolist()]
    pieces: list[list[int]] = []
    for place in range(len(ends)):
        pieces += [fact for fact, at in zip(facts, places, strict=True) if at == place]
        pieces += hay[place : place + 1]
    return Task([*itertools.chain(*pieces), *question], answer)


def fill(encode: Encode, sentences: Sequence[str], draw: np.random.Generator, tokens: int) -> list[list[int]]:
    """Draw sentences of `tokens` tokens in all; the first one may lack its beginning."""
    found: list[list[int]] = []
    while (missing := tokens - sum(map(len, found))) > 0:
        found.append(encode(sentences[int(draw.integers(len(sentences)))])[-missing:])
    return found[::-1]


def make_document(encode: Encode, draw: np.random.Generator, tokens: int) -> list[int]:
    """Draw a text of `tokens` tokens that states some facts again and again, one of them at the very end."""
    keys, values = draw.permutation(KEYS), draw.permutation(VALUES)
    facts = [encode(FACT.format(key=key, value=value)) for key, value in zip(keys, values, strict=False)]
    places = tokens // len(facts[0])
    facts = facts[: draw.integers(1, min(8, places // 2) + 1)]
    count = 1 + int(draw.uniform(0, 0.8) * (places - len(facts) - 1))
    *again, final = [facts[i] for i in draw.integers(len(facts), size=count)]
    hay = fill(encode, SENTENCES, draw, tokens - sum(map(len, [*facts, *again, final])))
    pieces = [*facts, *again, *hay]
    return [*itertools.chain(*(pieces[place] for place in draw.permutation(len(pieces)))), *final]


def encoder(tokenizer: "Tokenizer") -> Encode:
    """Return a function from text to token ids that remembers its results, as sentences come again."""
    return cache(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)


def word_tokenizer(file: Path) -> None:
    """Write a tokenizer.json with a token for each word of facts and sentences."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = " ".join([FACT.format(key="", value=""), *SENTENCES, *KEYS, *VALUES]).replace(".", " .").split()
    names = [EOS_TOKENS[0], "<|unknown|>", *dict.fromkeys(words)]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(names[:2])
    file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(file))


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files; exit code 2 if the options do not fit."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="PREFIX", help="prefix of the files to write")
    add("--documents", type=int, default=100_000, metavar="N", help="how many (default: %(default)s)")
    add("--tokens", type=int, default=256, metavar="N", help="length of the longest (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the texts (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        print(write_dataset(args.output, args.documents, args.tokens, args.seed))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write_dataset(output: Path, documents: int, tokens: int, seed: int) -> str:
    """Write PREFIX.bin, .idx, .json and .tokenizer.json; return a summary in one line."""
    if tokens < SHORTEST:
        raise ValueError(
            f"--tokens {tokens} must be at least {SHORTEST}, the length of the shortest document"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory(prefix=".needles-", dir=output.parent) as folder:
        file = Path(folder) / "tokenizer.json"
        word_tokenizer(file)
        tokenizer = load_tokenizer(file)
        end, size = eos_id(tokenizer), vocab_size(tokenizer)
        encode = encoder(tokenizer)
        about = f"scripts/needles.py --documents {documents} --tokens {tokens} --seed {seed}"
        with DatasetWriter(output, vocab_size=size, eos_id=end, tokenizer_file=file, source=about) as writer:
            for _ in range(documents):
                length = round(tokens ** draw.uniform(math.log(SHORTEST, tokens), 1))
                writer.add(np.array([*make_document(encode, draw, length - 1), end]))
    return f"{output}: {writer.num_documents:,} documents, {writer.num_tokens:,} tokens, {size} words"


if __name__ == "__main__":
    sys.exit(main())
