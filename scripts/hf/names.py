"""Names and shapes of MiniMax-01's tensors on the Hugging Face side, and where each lies in ours.

`transformers` and `text01` files hold the same tensors under the same names; only config.json differs.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from model.config import LayerType, ModelConfig

BUFFERS = re.compile(r"model\.layers\.\d+\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)")
"""What `save_pretrained` also writes and a model computes from its config: never read, never written."""


class HfTensor(NamedTuple):
    """A tensor of a Hugging Face checkpoint: a parameter of ours, or one matrix of a stacked one."""

    name: str
    """Name in the Hugging Face files."""
    parameter: str
    """Name of our parameter."""
    place: tuple[int, ...]
    """Index in the parameter's first dims; () = all of it."""
    shape: tuple[int, ...]
    """Shape in the Hugging Face files."""

    @property
    def is_gate(self) -> bool:
        """Whether it is a router's gate, which the releases keep in fp32."""
        return self.name.endswith(".block_sparse_moe.gate.weight")


def hf_tensors(cfg: ModelConfig) -> Iterator[HfTensor]:
    """List all tensors of a model; those of one parameter follow each other in the order of its memory."""
    table = (cfg.vocab_size, cfg.hidden_size)
    yield HfTensor("model.embed_tokens.weight", "embed.weight", (), table)
    for layer, kind in enumerate(cfg.layers):
        for theirs, parameter, place, shape in _layer(cfg, kind):
            yield HfTensor(f"model.layers.{layer}.{theirs}", f"blocks.{layer}.{parameter}", place, shape)
    yield HfTensor("model.norm.weight", "norm.weight", (), (cfg.hidden_size,))
    yield HfTensor("lm_head.weight", "head.weight", (), table)


def _layer(cfg: ModelConfig, kind: LayerType) -> Iterator[tuple[str, str, tuple[int, ...], tuple[int, ...]]]:
    """List a layer's tensors as (their name, our name, place, shape)."""
    hidden, width = cfg.hidden_size, cfg.num_heads * cfg.head_dim
    yield "input_layernorm.weight", "mixer_norm.weight", (), (hidden,)
    if kind is LayerType.lightning:
        yield "self_attn.qkv_proj.weight", "mixer.qkv.weight", (), (3 * width, hidden)
        yield "self_attn.output_gate.weight", "mixer.gate.weight", (), (width, hidden)
        yield "self_attn.out_proj.weight", "mixer.out.weight", (), (hidden, width)
        yield "self_attn.norm.weight", "mixer.norm.weight", (), (width,)
    else:
        narrow = cfg.num_kv_heads * cfg.head_dim
        yield "self_attn.q_proj.weight", "mixer.q.weight", (), (width, hidden)
        yield "self_attn.k_proj.weight", "mixer.k.weight", (), (narrow, hidden)
        yield "self_attn.v_proj.weight", "mixer.v.weight", (), (narrow, hidden)
        yield "self_attn.o_proj.weight", "mixer.out.weight", (), (hidden, width)
    yield "post_attention_layernorm.weight", "moe_norm.weight", (), (hidden,)
    yield "block_sparse_moe.gate.weight", "moe.router.gate.weight", (), (cfg.num_experts, hidden)
    expert = "block_sparse_moe.experts.{}.{}.weight"
    for e in range(cfg.num_experts):
        for half, name in enumerate(("w1", "w3")):
            yield expert.format(e, name), "moe.experts.gate_up", (e, half), (cfg.expert_ffn_size, hidden)
    for e in range(cfg.num_experts):
        yield expert.format(e, "w2"), "moe.experts.down", (e,), (hidden, cfg.expert_ffn_size)
