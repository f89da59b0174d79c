"""Parity with transformers' MiniMaxForCausalLM: logits, and the gradient of every parameter."""

import pytest
import torch
import torch.nn.functional as F

from model.config import LayerType
from tests.support.transformers_models import SHAPES, make_config, make_pair, one_document, to_theirs

L, S = LayerType.lightning, LayerType.softmax


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("tokens", [1, 37, 64])
def test_logits_and_gradients(shape: dict, tokens: int) -> None:
    ours, theirs = make_pair(make_config(**shape), seed=tokens)
    ids = torch.randint(101, (2, tokens))
    targets = torch.randint(101, (2, tokens))
    mine = ours(ids, one_document(2, tokens))
    reference = theirs(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)

    ours(ids, one_document(2, tokens), targets=targets).mean().backward()
    F.cross_entropy(reference.flatten(0, 1), targets.flatten()).backward()
    gradients = to_theirs({name: p.grad for name, p in ours.named_parameters()})
    scale = max(p.grad.abs().max() for p in theirs.parameters())
    for name, parameter in theirs.named_parameters():
        error = (gradients[name] - parameter.grad).abs().max() / max(parameter.grad.abs().max(), 1e-3 * scale)
        assert error < 1e-4, f"{name}: {error:.1e}"


@pytest.mark.parametrize("kind", [L, S])
def test_aux_loss_of_one_layer(kind: LayerType) -> None:
    """transformers pools over layers and lets f sum to top_k; on one layer it is top_k times ours."""
    cfg = make_config(layer_types=[kind], num_heads=4, num_kv_heads=2)
    ours, theirs = make_pair(cfg, seed=3)
    ids = torch.randint(101, (2, 50))
    weight = 0.25
    loss = ours(ids, one_document(2, 50), targets=ids, loss_weight=weight).mean()
    loss.backward()
    output = theirs(input_ids=ids, use_cache=False, output_router_logits=True)
    aux_loss = output.aux_loss / cfg.experts_per_token
    torch.testing.assert_close(ours.routers()[0].losses[0], aux_loss.detach(), rtol=1e-5, atol=1e-6)
    (F.cross_entropy(output.logits.flatten(0, 1), ids.flatten()) + weight * aux_loss).backward()
    mine = ours.blocks["0"].moe.router.gate.weight.grad
    torch.testing.assert_close(mine, theirs.model.layers[0].mlp.gate.weight.grad, rtol=1e-4, atol=1e-6)
