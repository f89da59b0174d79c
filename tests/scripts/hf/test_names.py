"""The names of MiniMax-01's released files, all of them, and the configurations of both public layouts."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import MiniMaxConfig

from model.config import LayerType, ModelConfig, SlopeRule
from model.transformer import Transformer
from scripts.hf.config import ConversionError, Layout, read_config, write_config
from scripts.hf.names import BUFFERS, hf_tensors
from tests.support.clone import ROOT

CARRIED = {"eos_token_id": 7, "max_position_embeddings": 99}
L, S = LayerType.lightning, LayerType.softmax
ALPHA = 3.5565588200778455
TEXT_01: dict[str, Any] = {  # as released, without the keys that are nowhere read
    "architectures": ["MiniMaxText01ForCausalLM"], "model_type": "minimax_text_01", "hidden_size": 6144,
    "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1] * 10, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 128, "rotary_dim": 64, "rope_theta": 10_000_000,
    "max_position_embeddings": 10_240_000, "num_local_experts": 32, "num_experts_per_tok": 2,
    "intermediate_size": 9216, "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid",
    "hidden_act": "silu", "postnorm": True, "rms_norm_eps": 1e-5, "sliding_window": None,
    "tie_word_embeddings": False, "vocab_size": 200_064, "bos_token_id": None, "eos_token_id": None,
    "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "attention_dropout": 0.0,
    "initializer_range": 0.02, "use_cache": True, "output_router_logits": False,
    **{f"layernorm_{kind}_alpha": ALPHA for kind in ("full_attention", "linear_attention", "mlp")},
    **{f"layernorm_{kind}_beta": 1.0 for kind in ("full_attention", "linear_attention", "mlp")},
}  # fmt: skip
TINY: dict[str, Any] = {
    "num_layers": 3, "hidden_size": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rotary_dim": 8,
    "vocab_size": 33, "num_experts": 3, "expert_ffn_size": 10, "layer_types": [L, S, L],
}  # fmt: skip


def released_index() -> dict[str, tuple[int, ...]]:
    """Name and shape of the 8243 tensors of MiniMax-Text-01, written down from its index."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (200_064, 6144),
        "model.norm.weight": (6144,),
        "lm_head.weight": (200_064, 6144),
    }
    for layer in range(80):
        parts: dict[str, tuple[int, ...]] = {
            "input_layernorm": (6144,),
            "post_attention_layernorm": (6144,),
            "block_sparse_moe.gate": (32, 6144),
        }
        if layer % 8 == 7:
            parts |= {"self_attn.q_proj": (8192, 6144), "self_attn.k_proj": (1024, 6144)}
            parts |= {"self_attn.v_proj": (1024, 6144), "self_attn.o_proj": (6144, 8192)}
        else:
            parts |= {"self_attn.qkv_proj": (24_576, 6144), "self_attn.output_gate": (8192, 6144)}
            parts |= {"self_attn.out_proj": (6144, 8192), "self_attn.norm": (8192,)}
        for expert in range(32):
            for name, shape in (("w1", (9216, 6144)), ("w2", (6144, 9216)), ("w3", (9216, 6144))):
                parts[f"block_sparse_moe.experts.{expert}.{name}"] = shape
        found |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in parts.items()}
    return found


def test_the_released_model_maps_completely_both_ways() -> None:
    index = released_index()
    assert len(index) == 8243
    cfg = read_config(TEXT_01, "config.json").model
    mapped = list(hf_tensors(cfg))
    assert {tensor.name: tensor.shape for tensor in mapped} == index
    assert len(mapped) == len(index)

    with torch.device("meta"):
        ours = {name: tuple(p.shape) for name, p in Transformer(cfg).named_parameters()}
    for parameter, shape in ours.items():
        mine = [tensor for tensor in mapped if tensor.parameter == parameter]
        lead = shape[: len(mine[0].place)]
        # every matrix of a stack, in the order of its memory
        assert [tensor.place for tensor in mine] == list(np.ndindex(lead))
        assert {tensor.shape for tensor in mine} == {shape[len(lead) :]}
    assert {tensor.parameter for tensor in mapped} == set(ours)
    assert sum(torch.Size(shape).numel() for shape in index.values()) == 456_089_655_296


def test_the_released_config() -> None:
    found = read_config(TEXT_01, "config.json")
    values = yaml.safe_load((ROOT / "conf/model/minimax_text_01.yaml").read_text())
    expected = ModelConfig(**values, rope_theta=1e7)
    assert found.model == replace(expected, layer_types=expected.layers)
    assert (found.layout, found.warnings) == (Layout.text01, [])
    config, warnings = write_config(found.model, Layout.text01, dtype="bfloat16", carried=found.carried)
    assert warnings == []
    assert config.pop("torch_dtype") == "bfloat16"
    assert config == {**TEXT_01, "pad_token_id": None}


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"residual_alpha": 1.25, "rope_theta": 123.5, "rotary_dim": 4, "norm_eps": 1e-6},
        {"num_heads": 6, "num_kv_heads": 3, "experts_per_token": 3, "layer_types": [S, S, L]},
        {"layer_types": [S, S, S]},
    ],
    ids=["plain", "constants", "odd heads", "no lightning"],
)
def test_configs_survive_both_ways(layout: Layout, changes: dict) -> None:
    cfg = ModelConfig(**{**TINY, **changes, "slope_rule": SlopeRule(layout)})
    config, _ = write_config(cfg, layout, dtype="float32", carried={**CARRIED, "block_size": 16})
    config = json.loads(json.dumps(config))
    found = read_config(config, "config.json")
    assert found.model == cfg
    assert CARRIED.items() <= found.carried.items()
    assert [text for text in found.warnings if "not used" in text] == []
    if layout is Layout.transformers:
        theirs = MiniMaxConfig(**config)
        assert theirs.block_size == found.carried["block_size"] == 16
        again = read_config(json.loads(theirs.to_json_string()), "config.json")
        assert (again.model, again.carried) == (cfg, found.carried)


def test_partial_rotary_is_said_loudly() -> None:
    cfg = ModelConfig(**{**TINY, "rotary_dim": 4, "slope_rule": SlopeRule.transformers})
    config, (warning,) = write_config(cfg, Layout.transformers, dtype="float32", carried={})
    assert "rotary_dim=4 of head_dim=8" in warning
    assert "--layout text01" in warning
    (warning,) = read_config(config, "here").warnings
    assert warning.startswith("here: rotary_dim=4")
    assert (
        write_config(replace(cfg, layer_types=[L, L, L]), Layout.transformers, dtype="", carried={})[1] == []
    )


@pytest.mark.parametrize(
    ("rule", "heads", "layout", "is_refused"),
    [
        ("text01", 4, "transformers", True),  # three layers: the last one's factor differs by 1e-5
        ("text01", 6, "transformers", True),
        ("transformers", 6, "text01", True),
        ("text01", 6, "text01", False),
    ],
)
def test_slopes_of_another_rule_are_refused(rule: str, heads: int, layout: str, is_refused: bool) -> None:
    cfg = ModelConfig(**{**TINY, "num_heads": heads, "slope_rule": SlopeRule(rule)})
    if not is_refused:
        write_config(cfg, Layout(layout), dtype="", carried={})
        return
    with pytest.raises(ConversionError, match=f"model.slope_rule={rule} .*use --layout {rule}"):
        write_config(cfg, Layout(layout), dtype="", carried={})


def test_slopes_that_agree_are_not_refused() -> None:
    cfg = read_config(TEXT_01, "").model  # 64 heads, 80 layers: 1.3e-7
    config, _ = write_config(cfg, Layout.transformers, dtype="", carried={})
    assert config["model_type"] == "minimax"


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"model_type": "llama"}, ["model_type=llama", "minimax_text_01"]),
        ({"hidden_size": None}, ["has no hidden_size"]),
        ({"vocab_size": "many"}, ["vocab_size='many' must be an integer"]),
        ({"attn_type_list": [0, 2, 1]}, ["attn_type_list=[0, 2, 1]"]),
        ({"attn_type_list": [0, 1]}, ["2 entries", "num_layers=80"]),
        ({"postnorm": False}, ["postnorm=False"]),
        ({"hidden_act": "gelu"}, ["hidden_act=gelu"]),
        ({"shared_intermediate_size": 64}, ["shared_intermediate_size=64"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings=True"]),
        ({"layernorm_mlp_beta": 0.5}, ["layernorm_mlp_beta=0.5"]),
        ({"layernorm_mlp_alpha": 1.0}, ["layernorm_mlp_alpha", "one weight for all"]),
        ({"rope_theta": None}, ["has no rope_theta"]),
        ({"rope_scaling": {"type": "yarn"}}, ["rope_type=yarn"]),
        ({"partial_rotary_factor": 0.25}, ["rotary_dim=64 and partial_rotary_factor=0.25", "disagree"]),
        ({"num_key_value_heads": 7}, ["num_kv_heads=7 must divide"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_configs_of_other_models_are_refused(changes: dict, texts: list[str]) -> None:
    with pytest.raises(ConversionError) as caught:
        read_config({**TEXT_01, **changes}, "hf/config.json")
    assert str(caught.value).startswith("hf/config.json: ")
    assert all(text in str(caught.value) for text in texts), caught.value


def test_keys_that_nobody_reads_are_named() -> None:
    (warning,) = read_config({**TEXT_01, "qk_norm": True}, "config.json").warnings
    assert "not used: qk_norm" in warning


def test_buffers_are_known() -> None:
    assert BUFFERS.fullmatch("model.layers.12.self_attn.slope_rate")
    assert not BUFFERS.fullmatch("model.layers.12.self_attn.norm.weight")
