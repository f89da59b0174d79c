"""Counts, slopes, initial weights and document isolation of the model."""

import itertools
import math
import re

import pytest
import torch
from torch import Tensor

from model.config import LayerType, ModelConfig, RouterConfig, SlopeRule
from model.flops import count_parameters, training_flops_per_token
from model.hashing import mix
from model.init import init_slice
from model.lightning import decay_slopes
from model.transformer import Transformer
from tests.support.small_models import SMALL, initialised
from train.config import CONF_DIR

TEXT_01 = {
    "num_layers": 80,
    "hidden_size": 6144,
    "num_heads": 64,
    "num_kv_heads": 8,
    "head_dim": 128,
    "rotary_dim": 64,
    "vocab_size": 200064,
    "num_experts": 32,
    "expert_ffn_size": 9216,
}


def test_text_01_has_the_published_size() -> None:
    cfg = ModelConfig(**TEXT_01)
    count = count_parameters(cfg)
    assert count.total == 456_089_655_296
    assert round(count.active / 1e9, 1) == 45.9
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(cfg).parameters()) == count.total
    assert [i for i, kind in enumerate(cfg.layers) if kind is LayerType.softmax] == list(range(7, 80, 8))
    assert cfg.alpha == 3.5565588200778455


@pytest.mark.parametrize(("context", "giga"), [(8192, 289), (131072, 349), (2**20, 800)])
def test_text_01_training_flops(context: int, giga: int) -> None:
    assert round(training_flops_per_token(ModelConfig(**TEXT_01), context) / 1e9) == giga


@pytest.mark.parametrize("every", [1, 2, 3, 8])
def test_count_equals_the_built_model(every: int) -> None:
    cfg = ModelConfig(**{**SMALL, "softmax_every": every})
    assert sum(p.numel() for p in Transformer(cfg).parameters()) == count_parameters(cfg).total


@pytest.mark.parametrize("path", sorted((CONF_DIR / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_model_files_build(path) -> None:
    import yaml

    cfg = ModelConfig(**yaml.safe_load(path.read_text()))
    with torch.device("meta"):
        model = Transformer(cfg)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(cfg).total


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "model.num_kv_heads=3 must divide model.num_heads=4; use one of"),
        ({"rotary_dim": 7}, "model.rotary_dim=7 must be even"),
        ({"rotary_dim": 14}, "<= head_dim=12"),
        ({"experts_per_token": 7}, "model.experts_per_token=7 must be <= num_experts=6"),
        ({"layer_types": [LayerType.softmax]}, "model.layer_types has 1 entries; give one for each of"),
        ({"hidden_size": 0}, "model.hidden_size=0 must be at least 1"),
        ({"rope_theta": 0.0}, "model.rope_theta=0.0 must be a number above 0"),
        ({"rope_theta": float("nan")}, "model.rope_theta=nan must be a number above 0"),
        ({"residual_alpha": 0.0}, "model.residual_alpha=0.0 must be a number above 0; null = (2 num_layers)"),
        ({"residual_alpha": float("inf")}, "model.residual_alpha=inf must be a number above 0"),
        ({"norm_eps": -1e-5}, "model.norm_eps=-1e-05 must be a number >= 0"),
        ({"lightning_norm_eps": float("nan")}, "model.lightning_norm_eps=nan must be a number >= 0"),
    ],
)
def test_impossible_sizes_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig(**{**SMALL, **change})


def test_slope_rules() -> None:
    """Both rules on a power of two; the ALiBi interleave and the plain formula on six heads."""
    cfg = ModelConfig(**TEXT_01)
    slopes = decay_slopes(cfg, 0)
    assert slopes[0] == pytest.approx(0.9170 * (1 + 1e-5), rel=1e-4)
    assert slopes[-1] == pytest.approx(0.00390625 * (1 + 1e-5))
    assert decay_slopes(cfg, 78)[0] == pytest.approx(0.91700404 * (1 - 78 / 79 + 1e-5))
    native = ModelConfig(**TEXT_01, slope_rule=SlopeRule.transformers)
    assert decay_slopes(native, 40) == pytest.approx(decay_slopes(cfg, 40), rel=1e-5)
    assert (
        max(abs(a - b) for a, b in zip(decay_slopes(native, 78), decay_slopes(cfg, 78), strict=True)) < 2e-7
    )
    six = ModelConfig(**{**SMALL, "num_heads": 6})
    factor = 1 + 1e-5
    alibi = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    assert decay_slopes(six, 0) == pytest.approx([s * factor for s in alibi])
    plain = ModelConfig(**{**SMALL, "num_heads": 6, "slope_rule": SlopeRule.transformers})
    assert decay_slopes(plain, 0) == pytest.approx([2 ** (-8 * (h + 1) / 6) * factor for h in range(6)])


def test_mix_is_splitmix64() -> None:
    """First outputs of the published generator seeded with 0 and 1234567."""
    for seed, value in ((0, 0xE220A8397B1DCDAF), (1234567, 6457827717110365317)):
        golden = 0x9E3779B97F4A7C15
        # The generator adds the constant and mixes; ours multiplies a counter by it: counter 1 is the seed 0.
        assert seed != 0 or mix(torch.tensor([1])).item() & (2**64 - 1) == value
        assert seed == 0 or _mix_of_state((seed + golden) % 2**64) == value


def _mix_of_state(state: int) -> int:
    inverse = pow(0x9E3779B97F4A7C15, -1, 2**64)
    counter = state * inverse % 2**64
    signed = counter - 2**64 if counter >= 2**63 else counter
    return mix(torch.tensor([signed])).item() & (2**64 - 1)


@pytest.mark.parametrize(
    ("name", "shape", "fans", "gained"),
    [
        ("embed.weight", (200, 300), (200, 300), False),
        ("head.weight", (200, 300), (200, 300), False),
        ("blocks.0.mixer.q.weight", (300, 200), (300, 200), False),
        ("blocks.1.mixer.k.weight", (100, 200), (100, 200), False),
        ("blocks.1.mixer.v.weight", (100, 200), (100, 200), True),
        ("blocks.1.mixer.gate.weight", (300, 200), (300, 200), False),
        ("blocks.1.mixer.out.weight", (200, 300), (200, 300), True),
        ("blocks.1.moe.router.gate.weight", (64, 600), (64, 600), False),
        ("blocks.3.moe.experts.gate_up", (3, 2, 100, 120), (100, 120), True),
        ("blocks.3.moe.experts.down", (3, 120, 100), (120, 100), True),
    ],
)
def test_init_is_xavier_normal_with_deepnorm_gain(name: str, shape, fans, gained: bool) -> None:
    cfg = ModelConfig(**SMALL)
    values = torch.empty(shape)
    init_slice(values, name, shape=shape, offset=(0,) * len(shape), cfg=cfg, seed=1)
    std = math.sqrt(2 / sum(fans)) * ((8 * cfg.num_layers) ** -0.25 if gained else 1.0)
    z = values / std
    n = z.numel()
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.square().mean() - 1) < 5 * (2 / n) ** 0.5
    assert abs(z.pow(4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert z.unique().numel() > 0.999 * n


def test_init_of_interleaved_qkv_gains_v_alone() -> None:
    cfg = ModelConfig(**{**SMALL, "hidden_size": 512, "head_dim": 64, "rotary_dim": 8})
    shape = (3 * 4 * 64, 512)
    values = torch.empty(shape)
    init_slice(values, "blocks.0.mixer.qkv.weight", shape=shape, offset=(0, 0), cfg=cfg, seed=0)
    q, k, v = values.view(4, 3, 64, 512).std(dim=(0, 2, 3)).tolist()
    xavier = math.sqrt(2 / (4 * 64 + 512))
    assert q == pytest.approx(xavier, rel=0.02)
    assert k == pytest.approx(xavier, rel=0.02)
    assert v == pytest.approx(xavier * 32**-0.25, rel=0.02)


@pytest.mark.parametrize("name", ["blocks.0.mixer.qkv.weight", "blocks.0.moe.experts.gate_up", "head.weight"])
def test_any_slice_equals_the_slice_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = ModelConfig(**SMALL)
    whole = dict(initialised(cfg).named_parameters())[name].detach()
    monkeypatch.setattr("model.init.CHUNK", 64)  # many chunks give the same values
    torch.manual_seed(0)
    for _ in range(20):
        low = [int(torch.randint(size, ())) for size in whole.shape]
        high = [int(torch.randint(a, size, ())) + 1 for a, size in zip(low, whole.shape, strict=True)]
        part = whole[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        mine = torch.empty(part.shape)
        init_slice(mine, name, shape=whole.shape, offset=low, cfg=cfg, seed=0)
        assert torch.equal(mine, part)


def test_init_depends_on_seed_name_and_expert() -> None:
    cfg = ModelConfig(**SMALL)
    first, second = (dict(initialised(cfg, seed).named_parameters()) for seed in (0, 1))
    matrices = {name: p for name, p in first.items() if p.dim() > 1}
    assert all(not torch.equal(p, second[name]) for name, p in matrices.items())
    experts = first["blocks.0.moe.experts.down"]
    tensors = [*experts, first["blocks.1.moe.experts.down"][0]]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(tensors, 2))


def losses_of(model: Transformer, tokens: Tensor, targets: Tensor, offsets: list[list[int]]) -> Tensor:
    return model(tokens, torch.tensor(offsets, dtype=torch.int32), targets=targets)


@pytest.mark.parametrize("kind", [LayerType.lightning, LayerType.softmax, None])
def test_documents_of_a_row_never_see_each_other(kind: LayerType | None) -> None:
    """A packed row gives each document the losses and gradients that it has in a row of its own."""
    cfg = ModelConfig(**SMALL, layer_types=None if kind is None else [kind] * 4)
    model = initialised(cfg)
    lengths = [1, 70, 1, 2, 63, 64, 30, 1]
    bounds = [0, *itertools.accumulate(lengths)]
    torch.manual_seed(5)
    tokens, targets = torch.randint(97, (2, 1, bounds[-1]))
    packed = losses_of(model, tokens, targets, [bounds])
    packed.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for start, end in itertools.pairwise(bounds):
        alone = losses_of(model, tokens[:, start:end], targets[:, start:end], [[0, end - start]])
        torch.testing.assert_close(packed[:, start:end], alone, rtol=1e-6, atol=1e-6)
        alone.sum().backward()
    scale = max(g.abs().max() for g in gradients.values())
    for name, parameter in model.named_parameters():
        error = (parameter.grad - gradients[name]).abs().max() / max(
            gradients[name].abs().max(), 1e-3 * scale
        )
        assert error < 1e-4, f"{name}: {error:.1e}"


@pytest.mark.parametrize("kind", list(LayerType))
def test_one_long_document_is_not_many(kind: LayerType) -> None:
    """The isolation above comes from the offsets: without them the losses differ."""
    model = initialised(ModelConfig(**SMALL, layer_types=[kind] * 4))
    tokens = torch.arange(90)[None] % 97
    apart = losses_of(model, tokens, tokens, [[0, 40, 90]])
    together = losses_of(model, tokens, tokens, [[0, 90, 90]])
    torch.testing.assert_close(apart[:, :40], together[:, :40])
    assert (apart - together)[:, 40:].abs().max() > 1e-3


def test_aux_loss_joins_the_gradient_and_counts_choices() -> None:
    """The gradient of loss_weight * (sum of the aux losses) reaches the gates; load counts all choices."""
    cfg = ModelConfig(**SMALL)
    model = initialised(cfg, router=RouterConfig(aux_loss_coefficient=1.0)).double()
    torch.manual_seed(0)
    tokens = torch.randint(97, (3, 20))
    offsets = torch.tensor([[0, 20]] * 3, dtype=torch.int32)
    gate = model.blocks["3"].moe.router.gate.weight

    def gate_gradient(weight: float) -> Tensor:
        model.zero_grad()
        model.reset_buffers()
        model(tokens, offsets, targets=tokens, loss_weight=weight).mean().backward()
        return gate.grad.clone()

    plain, with_aux = gate_gradient(0.0), gate_gradient(0.5)
    router = model.routers()[3]
    assert router.load.sum() == 3 * 20 * cfg.experts_per_token
    assert router.losses[0] >= 0.9

    difference = torch.zeros_like(gate)
    for index in [(0, 0), (2, 5), (5, 31)]:
        values = []
        for step in (1e-5, -1e-5):
            model.reset_buffers()
            with torch.no_grad():
                gate[index] += step
                model(tokens, offsets)
                gate[index] -= step
            values.append(router.losses[0].item())
        difference[index] = 0.5 * (values[0] - values[1]) / 2e-5
        torch.testing.assert_close((with_aux - plain)[index], difference[index], rtol=1e-4, atol=1e-8)


def test_evaluation_leaves_the_statistics_alone() -> None:
    model = initialised(ModelConfig(**SMALL)).eval()
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    model(tokens, torch.tensor([[0, 5]], dtype=torch.int32))
    assert not any(router.load.any() for router in model.routers())


def test_attention_knows_the_offsets_on_the_host() -> None:
    """Without asking the device: they came from the host."""
    model, seen = initialised(ModelConfig(**SMALL)), []
    core = model.blocks["1"].mixer.core
    core.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[3]))
    offsets = torch.tensor([[0, 3, 7], [0, 7, 7]], dtype=torch.int32)
    model(torch.randint(97, (2, 7)), offsets)
    assert [documents.on_host for documents in seen] == [offsets.tolist()]
