"""Small random models beside transformers' own."""

import torch
from torch import Tensor
from transformers import MiniMaxConfig, MiniMaxForCausalLM

from model.config import LayerType, ModelConfig, RouterConfig, SlopeRule
from model.transformer import Transformer

L, S = LayerType.lightning, LayerType.softmax

SHAPES = {
    "hybrid": {"layer_types": [L, L, L, S], "num_heads": 4, "num_kv_heads": 2},
    "odd heads": {"layer_types": [L, S, L], "num_heads": 3, "num_kv_heads": 1},
    "softmax first": {"layer_types": [S, L], "num_heads": 6, "num_kv_heads": 6, "experts_per_token": 3},
    "lightning only": {"layer_types": [L, L], "num_heads": 5, "num_kv_heads": 5},
    "one softmax layer": {"layer_types": [S], "num_heads": 4, "num_kv_heads": 4, "experts_per_token": 1},
    "own alpha": {"layer_types": [L, S], "num_heads": 2, "num_kv_heads": 1, "residual_alpha": 1.25},
}


def make_config(**changes) -> ModelConfig:
    sizes = {
        "num_layers": len(changes["layer_types"]),
        "hidden_size": 48,
        "head_dim": 16,
        "rotary_dim": 16,
        "vocab_size": 101,
        "num_experts": 5,
        "expert_ffn_size": 24,
        "rope_theta": 5000.0,
        "slope_rule": SlopeRule.transformers,
    }
    return ModelConfig(**{**sizes, **changes})


def make_pair(cfg: ModelConfig, seed: int) -> tuple[Transformer, MiniMaxForCausalLM]:
    """Our model with random weights, and theirs with the same ones."""
    torch.manual_seed(seed)
    ours = Transformer(cfg, router=RouterConfig(aux_loss_coefficient=1.0))
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.dim() > 1 else 0.3)
        if parameter.dim() == 1:
            parameter.data += 1
    names = {L: "linear_attention", S: "full_attention"}
    factors = {f"{kind}_alpha_factor": cfg.alpha for kind in ("full_attn", "linear_attn", "mlp")}
    theirs = MiniMaxForCausalLM(
        MiniMaxConfig(
            vocab_size=cfg.vocab_size,
            hidden_size=cfg.hidden_size,
            intermediate_size=cfg.expert_ffn_size,
            num_hidden_layers=cfg.num_layers,
            num_attention_heads=cfg.num_heads,
            num_key_value_heads=cfg.num_kv_heads,
            head_dim=cfg.head_dim,
            rms_norm_eps=cfg.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
            layer_types=[names[kind] for kind in cfg.layers],
            num_local_experts=cfg.num_experts,
            num_experts_per_tok=cfg.experts_per_token,
            block_size=16,
            attn_implementation="eager",
            bos_token_id=None,
            eos_token_id=None,
            **factors,
        )
    )
    missing, unexpected = theirs.load_state_dict(to_theirs(dict(ours.named_parameters())), strict=False)
    assert not unexpected
    assert all(name.rpartition(".")[2].endswith(("decay", "slope_rate")) for name in missing), missing
    return ours, theirs


def one_document(rows: int, tokens: int) -> Tensor:
    return torch.tensor([[0, tokens]] * rows, dtype=torch.int32)


def to_theirs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under transformers' names and shapes."""
    fixed = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    fixed["head.weight"] = "lm_head.weight"
    parts = {
        "mixer_norm.weight": "input_layernorm.weight",
        "moe_norm.weight": "post_attention_layernorm.weight",
        "mixer.qkv.weight": "self_attn.qkv_proj.weight",
        "mixer.gate.weight": "self_attn.output_gate.weight",
        "mixer.norm.weight": "self_attn.norm.weight",
        "mixer.q.weight": "self_attn.q_proj.weight",
        "mixer.k.weight": "self_attn.k_proj.weight",
        "mixer.v.weight": "self_attn.v_proj.weight",
        "moe.router.gate.weight": "mlp.gate.weight",
        "moe.experts.gate_up": "mlp.experts.gate_up_proj",
        "moe.experts.down": "mlp.experts.down_proj",
    }
    result = {}
    for name, tensor in tensors.items():
        if name in fixed:
            result[fixed[name]] = tensor.detach()
            continue
        _, layer, part = name.split(".", 2)
        is_lightning = f"blocks.{layer}.mixer.qkv.weight" in tensors
        out = "self_attn.out_proj.weight" if is_lightning else "self_attn.o_proj.weight"
        target = out if part == "mixer.out.weight" else parts[part]
        flat = tensor.flatten(1, 2) if part == "moe.experts.gate_up" else tensor
        result[f"model.layers.{layer}.{target}"] = flat.detach()
    return result
