"""The whole model on the GPU's kernels, interpreted where there is no GPU: losses and every gradient."""

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig, RouterConfig
from model.transformer import Transformer
from tests.support.kernel_checks import DEVICE, kernels_for_every_tensor
from tests.support.small_models import SMALL, initialised

SIZES = {**SMALL, "num_layers": 2, "head_dim": 16, "rotary_dim": 8, "expert_ffn_size": 16}
TOKENS = 80


def losses_and_gradients(model: Transformer, lengths: Tensor | None) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(SIZES["vocab_size"], (2, TOKENS), generator=draw)
    targets = torch.randint(-1, SIZES["vocab_size"], (2, TOKENS), generator=draw)
    offsets = torch.tensor([[0, 7, 70, TOKENS], [0, 33, TOKENS, TOKENS]], dtype=torch.int32)
    device = next(model.parameters()).device
    lengths = None if lengths is None else lengths.to(device)
    losses = model(tokens.to(device), offsets, targets=targets.to(device), lengths=lengths, loss_weight=0.5)
    losses.sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    counted = {f"load.{router.layer}": router.load for router in model.routers()}
    return {name: x.detach().cpu() for name, x in {"losses": losses, **found, **counted}.items()}


@pytest.mark.parametrize("capacity", [None, 1.0])
def test_the_model_is_the_same_on_kernels(capacity: float | None) -> None:
    """Packed documents, padding, dropped choices, balancing losses, both mixers."""
    router = RouterConfig(capacity_factor=capacity, z_loss_coefficient=0.1)
    lengths = torch.tensor([70, TOKENS], dtype=torch.int32) if capacity else None
    expected = losses_and_gradients(initialised(ModelConfig(**SIZES), router=router), lengths)
    model = initialised(ModelConfig(**SIZES), router=router).to(DEVICE)
    with kernels_for_every_tensor():
        actual = losses_and_gradients(model, lengths)
    largest = max(float(g.abs().max()) for name, g in expected.items() if name != "losses")
    torch.testing.assert_close(actual["losses"], expected["losses"], rtol=1e-5, atol=1e-5)
    for name, right in expected.items():
        scale = max(float(right.abs().max()), 1e-3 * largest) if right.is_floating_point() else 1.0
        assert float((actual[name] - right).abs().max()) <= 1e-4 * scale, name
