"""Rows read piece by piece against the forward pass over whole rows."""

import random

import pytest
import torch
from torch import Tensor

from kernels.documents import locate_documents
from kernels.lightning_attention import lightning_attention_with_state
from kernels.reference import lightning_attention_with_state as twin_with_state
from model.config import LayerType, ModelConfig
from model.decoding import RecurrentCore, decoding
from model.transformer import Transformer
from tests.support.kernel_checks import kernels_for_every_tensor
from tests.support.small_models import SMALL, initialised

L, S = LayerType.lightning, LayerType.softmax


def pieces_of(tokens: int, draw: random.Random) -> list[int]:
    """Sizes of random pieces, many of them a single token."""
    sizes: list[int] = []
    while (left := tokens - sum(sizes)) > 0:
        sizes.append(draw.choice([1, 1, 2, min(left, 70), draw.randint(1, left)]) if left > 1 else 1)
    return sizes


def offsets_of(begins: Tensor) -> Tensor:
    """[rows, documents + 1] int32 of the rows whose documents begin where `begins` says so."""
    tokens = begins.shape[1]
    rows = [[0, *(place for place in row.nonzero().flatten().tolist() if place), tokens] for row in begins]
    width = max(map(len, rows))
    return torch.tensor([row + [tokens] * (width - len(row)) for row in rows], dtype=torch.int32)


def read_in_pieces(
    model: Transformer, tokens: Tensor, begins: Tensor, sizes: list[int], *, capacity: int | None = None
) -> Tensor:
    with decoding(model, rows=len(tokens), capacity=capacity or tokens.shape[1]) as decoder:
        read = [
            decoder.read(piece, some)
            for piece, some in zip(tokens.split(sizes, 1), begins.split(sizes, 1), strict=True)
        ]
        return decoder.logits(torch.cat(read, 1))


@pytest.mark.parametrize("seed", range(12))
def test_pieces_of_any_size_equal_the_whole_rows(seed: int) -> None:
    draw, torch_draw = random.Random(seed), torch.Generator().manual_seed(seed)
    layers = [draw.choice([L, S]) for _ in range(3)] + [L, S]
    cfg = ModelConfig(**{**SMALL, "num_layers": 5, "layer_types": layers, "head_dim": draw.choice([12, 16])})
    model = initialised(cfg, seed).eval()
    rows, tokens = draw.randint(1, 4), draw.randint(2, 200)
    ids = torch.randint(SMALL["vocab_size"], (rows, tokens), generator=torch_draw)
    begins = torch.rand(rows, tokens, generator=torch_draw) < draw.choice([0.0, 0.02, 0.2])
    sizes = pieces_of(tokens, draw)
    with torch.no_grad():
        whole = model(ids, offsets_of(begins))
    found = read_in_pieces(model, ids, begins, sizes, capacity=tokens + draw.randint(0, 9))
    assert (found - whole).abs().max() < 1e-5, sizes


def test_rows_with_padding_in_front_equal_rows_of_their_own() -> None:
    model = initialised(ModelConfig(**SMALL), 3).eval()
    draw = torch.Generator().manual_seed(3)
    lengths, width = [5, 40, 23], 40
    ids = torch.randint(SMALL["vocab_size"], (3, width), generator=draw)
    begins = torch.zeros(3, width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        begins[row, width - length] = True
    found = read_in_pieces(model, ids, begins, [7, 26, *[1] * 7])
    for row, length in enumerate(lengths):
        alone = ids[row : row + 1, width - length :]
        with torch.no_grad():
            whole = model(alone, torch.tensor([[0, length]], dtype=torch.int32))[0]
        assert (found[row, width - length :] - whole).abs().max() < 1e-5


def test_losses_of_pieces_equal_those_of_the_row() -> None:
    model = initialised(ModelConfig(**SMALL), 1).eval()
    ids = torch.arange(60)[None] * 7 % SMALL["vocab_size"]
    targets = torch.cat([ids[:, 1:], torch.tensor([[-1]])], 1)
    with torch.no_grad():
        whole = model(ids, torch.tensor([[0, 60]], dtype=torch.int32), targets=targets)
    with decoding(model, rows=1, capacity=60) as decoder:
        none = torch.zeros(1, 60, dtype=torch.bool)
        parts = [
            decoder.losses(decoder.read(piece, none[:, : piece.shape[1]]), target)
            for piece, target in zip(ids.split(25, 1), targets.split(25, 1), strict=True)
        ]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5


def test_lightning_states_do_not_grow_and_the_model_is_given_back() -> None:
    cfg = ModelConfig(**SMALL)
    model = initialised(cfg).train()
    seams = [model.locate, model.norm, model.head, *(b.mixer.core for b in model.blocks.values())]
    sizes = set()
    with decoding(model, rows=2, capacity=300) as decoder:
        for length in (1, 2, 64, 100, 1, 130):
            piece = torch.zeros(2, length, dtype=torch.int64)
            decoder.read(piece, torch.zeros(2, length, dtype=torch.bool))
            sizes.add(decoder.state_bytes())
        assert not model.training
        states = [core.state for core in model.modules() if isinstance(core, RecurrentCore)]
        assert {state.dtype for state in states if state is not None} == {torch.float32}
        with pytest.raises(ValueError, match="up to token 303: made for 2 rows of up to 300"):
            decoder.read(torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.bool))
    assert sizes == {2 * 2 * cfg.num_heads * cfg.head_dim**2 * 4}  # two lightning layers, two rows
    assert seams == [model.locate, model.norm, model.head, *(b.mixer.core for b in model.blocks.values())]
    assert model.training


@pytest.mark.parametrize("tokens", [1, 17, 50])
def test_kernel_and_twin_hand_on_the_same_state(tokens: int) -> None:
    """Interpreted where there is no GPU; positions that began before the piece, as `Decoder.locate` gives."""
    draw = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(2, tokens, 2, 16, generator=draw) for _ in range(3))
    state = torch.randn(2, 2, 16, 16, generator=draw)
    slopes = torch.tensor([0.9, 0.01])
    places = [[0, tokens, tokens], [0, (tokens + 1) // 2, tokens]]
    documents = locate_documents(torch.tensor(places, dtype=torch.int32), tokens)
    documents = documents._replace(positions=documents.positions + 9 * (documents.ids == 0))
    twin = twin_with_state(q, k, v, slopes, documents, initial_state=state)
    with kernels_for_every_tensor():
        kernel = lightning_attention_with_state(q, k, v, slopes, documents, initial_state=state)
    for a, b in zip(kernel, twin, strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max()
