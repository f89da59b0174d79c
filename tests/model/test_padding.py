"""Padding at a row's end is as if it were not there: losses, gradients, what the router counts and drops."""

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig, RouterConfig
from model.transformer import Transformer

MODEL = ModelConfig(
    num_layers=4, hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=8, rotary_dim=4, vocab_size=31,
    num_experts=4, expert_ffn_size=12, softmax_every=2,
)  # fmt: skip
LENGTHS = [9, 5, 1, 7]


def run(
    router: RouterConfig, rows: list[list[int]], width: int
) -> tuple[list[Tensor], dict[str, Tensor], Transformer]:
    """Losses a document, gradients and model; rows list the documents that lie in each, width its tokens."""
    torch.manual_seed(0)
    model = Transformer(MODEL, router=router).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    texts = [torch.randint(31, (2, length)) for length in LENGTHS]
    tokens, targets = torch.zeros(2, len(rows), width, dtype=torch.int64).unbind()
    targets -= 100
    offsets = torch.full((len(rows), len(LENGTHS) + 2), width, dtype=torch.int32)
    places, lengths = {}, []
    for row, documents in enumerate(rows):
        end = 0
        for number, document in enumerate(documents):
            offsets[row, number] = end
            places[document] = row, slice(end, end + LENGTHS[document])
            tokens[places[document]], targets[places[document]] = texts[document]
            end += LENGTHS[document]
        offsets[row, len(documents)] = end
        lengths.append(end)
    losses = model(
        tokens, offsets, targets=targets, loss_weight=1.0,
        lengths=None if min(lengths) == width else torch.tensor(lengths),
    )  # fmt: skip
    losses.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return [losses[places[document]].detach() for document in range(len(LENGTHS))], gradients, model


@pytest.mark.parametrize("factor", [None, 0.7])
def test_padded_rows_equal_one_full_row(factor: float | None) -> None:
    """Documents in their order, in one row without and in three rows with padding."""
    # One document's worth of rotation: the order of admission begins at row and document 0 in both.
    router = RouterConfig(capacity_factor=factor, z_loss_coefficient=0.1, aux_loss_coefficient=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.router.draw", lambda *parts: 0)
        losses, gradients, whole = run(router, [[0, 1, 2, 3]], sum(LENGTHS))
        padded_losses, padded_gradients, padded = run(router, [[0], [1, 2], [3]], 12)
    for mine, expected in zip(padded_losses, losses, strict=True):
        torch.testing.assert_close(mine, expected)
    for name, expected in gradients.items():
        torch.testing.assert_close(padded_gradients[name], expected, rtol=1e-6, atol=1e-9, msg=name)
    for mine, expected in zip(padded.routers(), whole.routers(), strict=True):
        assert torch.equal(mine.load, expected.load)
        assert mine.load.sum() == sum(LENGTHS) * 2
        assert torch.equal(mine.dropped, expected.dropped)
        assert bool(mine.dropped.any()) is (factor is not None)
        torch.testing.assert_close(mine.losses, expected.losses)


def test_padding_is_not_computed() -> None:
    """What stands in the padding changes nothing, and no expert sees it, in evaluation either."""
    seen = []
    model = Transformer(MODEL).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    experts = model.blocks["1"].moe.experts
    compute = experts._compute
    experts._compute = lambda x, weights, ends: seen.append(len(x)) or compute(x, weights, ends)
    tokens = torch.randint(31, (1, 10))
    offsets = torch.tensor([[0, 6, 10]], dtype=torch.int32)
    logits = model(tokens, offsets, lengths=torch.tensor([6]))
    tokens[:, 6:] = 3
    again = model(tokens, offsets, lengths=torch.tensor([6]))
    assert torch.equal(logits[:, :6], again[:, :6])
    assert seen == [12, 12]
