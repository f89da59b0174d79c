"""Tokens from logits, and continuations of prompts that are read in pieces and written token by token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.decoding import Decoder, decoding
from model.hashing import draw, uniform
from model.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen."""

    temperature: float = 0.0
    """0 = the most probable token."""
    top_k: int | None = None
    """Only the k most probable tokens; null = all."""
    top_p: float = 1.0
    """Only the most probable tokens that together have this probability."""
    seed: int = 0
    """Row i draws by seed and i alone, whatever stands beside it."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be >= 0; 0 takes the most probable token")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")


def choose(logits: Tensor, draws: Tensor, how: Sampling) -> Tensor:
    """[rows, vocab] logits, [rows] uniform in [0, 1) -> [rows] token ids."""
    if how.temperature == 0:
        return logits.argmax(-1)
    scores, tokens = logits.double().sort(dim=-1, descending=True, stable=True)
    scores, tokens = scores[:, : how.top_k], tokens[:, : how.top_k]
    chances = (scores / how.temperature).softmax(-1)
    before = chances.cumsum(-1) - chances
    chances = chances * (before < how.top_p)  # the first token always stays
    reached = chances.cumsum(-1)
    place = torch.searchsorted(reached, (draws.to(reached) * reached[:, -1])[:, None], right=True)
    last = (chances > 0).sum(-1, keepdim=True) - 1
    return tokens.gather(1, torch.minimum(place, last))[:, 0]


def continue_prompts(
    model: Transformer, prompts: Sequence[Sequence[int]], *, end: int | None, max_tokens: int,
    how: Sampling, chunk: int = 2048,
) -> list[list[int]]:  # fmt: skip
    """What the model writes after each prompt, up to and with its end-of-document token.

    Args:
        prompts: token ids, at least one each; `end` inside a prompt begins a new document behind it.
        end: token that ends a document; None: there is none, so all run to max_tokens.
        max_tokens: new tokens of each prompt.
        chunk: tokens of a row that are read at once.
    """
    for number, prompt in enumerate(prompts):
        if not prompt or prompt[-1] == end:
            raise ValueError(
                f"prompt {number} is empty or ends with the end-of-document token; a document "
                "begins with its first word, so give that"
            )
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    keys = [draw(how.seed, row) for row in range(len(prompts))]
    written: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts))) if max_tokens else set()
    with decoding(model, rows=len(prompts), capacity=width + max(max_tokens - 1, 0)) as decoder:
        hidden = read_prompts(decoder, prompts, end=end, chunk=chunk)
        nothing = torch.zeros(len(prompts), 1, dtype=torch.bool)
        while open_rows:
            count = torch.tensor(max(map(len, written)))
            draws = torch.stack([uniform(count, key) for key in keys]).to(device)
            tokens = choose(decoder.logits(hidden), draws, how)
            for row, token in enumerate(tokens.tolist()):
                if row in open_rows:
                    written[row].append(token)
                    if token == end or len(written[row]) == max_tokens:
                        open_rows.remove(row)
            if open_rows:
                hidden = decoder.read(tokens[:, None], nothing)[:, -1]
    return written


def read_prompts(
    decoder: Decoder, prompts: Sequence[Sequence[int]], *, end: int | None, chunk: int
) -> Tensor:
    """Hidden states [rows, hidden] of the prompts' last tokens; shorter prompts get padding in front."""
    device, hidden = next(decoder.model.parameters()).device, None
    for tokens, begins in _chunks(prompts, end, chunk):
        hidden = decoder.read(tokens.to(device), begins)[:, -1]
    assert hidden is not None
    return hidden


def _chunks(prompts: Sequence[Sequence[int]], end: int | None, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens [rows, up to chunk] and which of them begin a document, alike."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    begins = torch.zeros_like(tokens, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        first = width - len(prompt)
        begins[row, first] = True
        if end is not None:
            begins[row, first + 1 :] = tokens[row, first:-1] == end
    yield from zip(tokens.split(chunk, 1), begins.split(chunk, 1), strict=True)
