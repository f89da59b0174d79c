"""Small models with their initial weights."""

from model.config import ModelConfig, RouterConfig
from model.init import init_slice
from model.transformer import Transformer

SMALL = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 12,
    "rotary_dim": 6,
    "vocab_size": 97,
    "num_experts": 6,
    "expert_ffn_size": 20,
    "softmax_every": 2,
}


def initialised(cfg: ModelConfig, seed: int = 0, router: RouterConfig | None = None) -> Transformer:
    model = Transformer(cfg, router=router)
    for name, parameter in model.named_parameters():
        zeros = (0,) * parameter.dim()
        init_slice(parameter.data, name, shape=parameter.shape, offset=zeros, cfg=cfg, seed=seed)
    return model
