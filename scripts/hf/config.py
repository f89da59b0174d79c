"""Reads and writes config.json of MiniMax-01 models in both public layouts.

A field that would change what is computed, and that the other side has no word for, is an error.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from model.config import LayerType, ModelConfig, SlopeRule
from model.lightning import decay_slopes

Config = Mapping[str, Any]


class ConversionError(ValueError):
    """Raised for what cannot be converted; the text names file, key, value and remedy."""


Layout = StrEnum("Layout", ["transformers", "text01"])
"""Whose names config.json uses."""


MODEL_TYPES = {
    "minimax": Layout.transformers,
    "minimax_text_01": Layout.text01,
    "minimax_m1": Layout.text01,
}
SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_ffn_size": "intermediate_size",
}
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "shared_intermediate_size": (None, 0, [0]),
}
"""Values that this model family computes with; the first one holds where the key is missing."""
CARRIED = {
    "max_position_embeddings": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "block_size": 256,
    "initializer_range": 0.02,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "attention_dropout": 0.0,
}
"""Keys that mean nothing to the weights and are handed through, and what an export says without them."""
UNUSED = {
    "architectures", "auto_map", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder",
    "label2id", "model_type", "output_attentions", "output_hidden_states", "output_router_logits",
    "problem_type", "return_dict", "shared_moe_mode", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
ROTARY = {"rope_parameters", "rope_scaling", "rope_theta", "rotary_dim", "partial_rotary_factor"}
FACTORS = {  # full attention, linear attention, MLP
    Layout.text01: (
        "layernorm_full_attention_{}",
        "layernorm_linear_attention_{}",
        "layernorm_mlp_{}",
    ),
    Layout.transformers: ("full_attn_{}_factor", "linear_attn_{}_factor", "mlp_{}_factor"),
}
LIGHTNING_NORM_EPS = 1e-6
"""Epsilon of the norm in lightning layers, for which neither layout has a key."""
SLOPE_TOLERANCE = 1e-6
PARTIAL_ROTARY = (
    "{}: rotary_dim={} of head_dim={}: transformers (5.23 and before) ignores this, rotates whole heads and "
    "computes other logits without a word. {}"
)


@dataclass(frozen=True)
class Imported:
    """What a config.json says."""

    model: ModelConfig
    """Configuration of the model."""
    layout: Layout
    """Layout whose names the file uses."""
    carried: dict[str, Any]
    """Values of `CARRIED` that the file has."""
    warnings: list[str]
    """What a user must know of it."""


def read_config(config: Config, file: str) -> Imported:
    """Read the model of a config.json; `file` is its name in messages.

    Raises:
        ConversionError: another architecture, a missing key, or a value that this model has no form for.
    """
    layout = _layout(config, file)
    values: dict[str, Any] = {ours: _integer(config, theirs, file) for ours, theirs in SIZES.items()}
    own = values["hidden_size"] // values["num_heads"]
    values["head_dim"] = _integer({"head_dim": own, **_given(config, "head_dim")}, "head_dim", file)
    values["norm_eps"] = _number(config, "rms_norm_eps", file)
    values["layer_types"] = _layer_types(config, layout, file)
    values["slope_rule"] = SlopeRule(layout)
    for key, allowed in FIXED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ConversionError(f"{file}: {key}={config[key]}: this model has only {key}={allowed[0]}")
    if layout is Layout.text01 and config.get("postnorm") is not True:
        raise ConversionError(
            f"{file}: postnorm={config.get('postnorm')}: the residual is taken after the norm here; only "
            "models with postnorm=true can be read"
        )
    values["residual_alpha"] = _alpha(config, layout, values, file)
    values |= _rotary(config, values["head_dim"], file)
    try:
        model = ModelConfig(**values)
    except ValueError as error:
        raise ConversionError(f"{file}: {error}") from error
    known = {*SIZES.values(), *FIXED, *CARRIED, *UNUSED, *ROTARY, "head_dim", "rms_norm_eps", "postnorm"}
    known |= {"layer_types", "attn_type_list"}
    known |= {key.format(part) for key in FACTORS[layout] for part in ("alpha", "beta")}
    warnings = [f"{file}: not used: {', '.join(extra)}"] if (extra := sorted(set(config) - known)) else []
    if layout is Layout.transformers and model.rotary_dim < model.head_dim and _has_softmax(model):
        remedy = "It is read as written; weights that were trained with transformers need it removed."
        warnings.append(PARTIAL_ROTARY.format(file, model.rotary_dim, model.head_dim, remedy))
    return Imported(model, layout, {key: config[key] for key in CARRIED if key in config}, warnings)


def write_config(
    cfg: ModelConfig, layout: Layout, *, dtype: str, carried: Config
) -> tuple[dict[str, Any], list[str]]:
    """Write the config.json of a model.

    Returns:
        Its content, and what its readers will do otherwise.

    Raises:
        ConversionError: the layout computes something else for this model.
    """
    _check_slopes(cfg, layout)
    if cfg.lightning_norm_eps != LIGHTNING_NORM_EPS:
        raise ConversionError(
            f"model.lightning_norm_eps={cfg.lightning_norm_eps}: layout {layout} computes with "
            f"{LIGHTNING_NORM_EPS} and has no key for it; only models trained with that can be exported"
        )
    config: dict[str, Any] = {theirs: getattr(cfg, ours) for ours, theirs in SIZES.items()}
    config |= {key: allowed[0] for key, allowed in FIXED.items() if allowed[0] is not None}
    config |= {key: carried.get(key, value) for key, value in CARRIED.items()}
    if config["max_position_embeddings"] is None:
        del config["max_position_embeddings"]
    full, linear, mlp = FACTORS[layout]
    for key in (full, linear, mlp):
        config |= {key.format("alpha"): cfg.alpha, key.format("beta"): 1.0}
    config |= {"head_dim": cfg.head_dim, "rms_norm_eps": cfg.norm_eps, "rotary_dim": cfg.rotary_dim}
    config |= {"sliding_window": None, "use_cache": True, "output_router_logits": False}
    warnings = []
    if layout is Layout.text01:
        del config["block_size"]
        config |= {
            "architectures": ["MiniMaxText01ForCausalLM"],
            "model_type": "minimax_text_01",
            "attn_type_list": [int(kind is LayerType.softmax) for kind in cfg.layers],
            "postnorm": True,
            "rope_theta": cfg.rope_theta,
            "shared_intermediate_size": 0,
            "shared_moe_mode": "sigmoid",
            "torch_dtype": dtype,
        }
    else:
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": cfg.rope_theta}
        if cfg.rotary_dim < cfg.head_dim:
            rope["partial_rotary_factor"] = cfg.rotary_dim / cfg.head_dim
        names = {LayerType.lightning: "linear_attention", LayerType.softmax: "full_attention"}
        config |= {
            "architectures": ["MiniMaxForCausalLM"],
            "model_type": "minimax",
            "layer_types": [names[kind] for kind in cfg.layers],
            "rope_parameters": rope,
            "dtype": dtype,
        }
        if cfg.rotary_dim < cfg.head_dim and _has_softmax(cfg):
            remedy = "Use --layout text01, or train with model.rotary_dim=model.head_dim."
            warnings.append(PARTIAL_ROTARY.format("config.json", cfg.rotary_dim, cfg.head_dim, remedy))
    return dict(sorted(config.items())), warnings


def _has_softmax(cfg: ModelConfig) -> bool:
    return LayerType.softmax in cfg.layers


def _check_slopes(cfg: ModelConfig, layout: Layout) -> None:
    """Refuse a layout whose formula gives another decay than the model was trained with."""
    other = replace(cfg, slope_rule=SlopeRule(layout))
    lightning = [layer for layer, kind in enumerate(cfg.layers) if kind is LayerType.lightning]
    differences = [
        abs(a - b)
        for layer in lightning
        for a, b in zip(decay_slopes(cfg, layer), decay_slopes(other, layer), strict=True)
    ]
    if (most := max(differences, default=0.0)) > SLOPE_TOLERANCE:
        raise ConversionError(
            f"model.slope_rule={cfg.slope_rule} with model.num_heads={cfg.num_heads}: layout {layout} would "
            f"decay by slopes that differ by up to {most:.1e}, more than {SLOPE_TOLERANCE}; "
            f"use --layout {cfg.slope_rule}"
        )


def _layout(config: Config, file: str) -> Layout:
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise ConversionError(
            f"{file}: model_type={kind} (architectures={config.get('architectures')}) is no MiniMax-01 "
            f"model; known: {', '.join(MODEL_TYPES)}"
        )
    return MODEL_TYPES[kind]


def _required(config: Config, key: str, file: str) -> Any:
    if config.get(key) is None:
        raise ConversionError(f"{file}: has no {key}; add the value that the model was trained with")
    return config[key]


def _given(config: Config, *keys: str) -> Config:
    """Take the keys that have a value."""
    return {key: config[key] for key in keys if config.get(key) is not None}


def _integer(config: Config, key: str, file: str) -> int:
    value = _required(config, key, file)
    if type(value) is not int or value < 1:
        raise ConversionError(f"{file}: {key}={value!r} must be an integer, at least 1")
    return value


def _number(config: Config, key: str, file: str) -> float:
    value = _required(config, key, file)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ConversionError(f"{file}: {key}={value!r} must be a finite number")
    return float(value)


def _layer_types(config: Config, layout: Layout, file: str) -> list[LayerType]:
    key = "attn_type_list" if layout is Layout.text01 else "layer_types"
    names: dict[Any, LayerType] = {"linear_attention": LayerType.lightning, 0: LayerType.lightning}
    names |= {"full_attention": LayerType.softmax, 1: LayerType.softmax}
    listed = _required(config, key, file)
    if not isinstance(listed, list) or not all(isinstance(k, str | int) and k in names for k in listed):
        raise ConversionError(f"{file}: {key}={listed}: must be a list of {', '.join(map(str, names))}")
    return [names[kind] for kind in listed]


def _alpha(config: Config, layout: Layout, values: Config, file: str) -> float | None:
    """Read the one weight of all residuals; None where it is DeepNorm's own."""
    present = {LayerType.softmax: 0, LayerType.lightning: 1}
    used = [FACTORS[layout][i] for kind, i in present.items() if kind in values["layer_types"]]
    used.append(FACTORS[layout][2])
    for key in used:
        if (beta := _number(config, key.format("beta"), file)) != 1:
            raise ConversionError(f"{file}: {key.format('beta')}={beta}: this model has only 1")
    alphas = {key.format("alpha"): _number(config, key.format("alpha"), file) for key in used}
    if len(set(alphas.values())) > 1:
        raise ConversionError(f"{file}: {alphas}: this model has one weight for all residuals")
    alpha = next(iter(alphas.values()))
    return None if math.isclose(alpha, (2 * values["num_layers"]) ** 0.25, rel_tol=1e-15) else alpha


def _rotary(config: Config, head_dim: int, file: str) -> dict[str, Any]:
    """Read rotary_dim and rope_theta: on top in text01 and older files, else in rope_parameters."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ConversionError(f"{file}: rope_parameters={rope!r} must be an object of keys and values")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConversionError(f"{file}: rope_type={kind}: this model has only unscaled RoPE (default)")
    theta = _number({**config, **rope}, "rope_theta", file)
    factor = _given({**config, **rope}, "partial_rotary_factor")
    said = {round(_number(factor, key, file) * head_dim) for key in factor}
    said |= {_integer(config, key, file) for key in _given(config, "rotary_dim")}
    if len(said) > 1:
        raise ConversionError(
            f"{file}: rotary_dim={config['rotary_dim']} and partial_rotary_factor="
            f"{factor['partial_rotary_factor']} of head_dim={head_dim} disagree; keep one of them"
        )
    return {"rotary_dim": said.pop() if said else head_dim, "rope_theta": theta}
