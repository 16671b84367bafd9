"""A decoder as named tensors, the way Hugging Face and llama.cpp name and split them.

Our decoders keep queries, keys and values in one matrix, and gate and up in another, each with one scale.
Both are split by rows here, codes as they are: nothing is quantized a second time. That matters, because the
mean magnitude of codes * scale is not the scale again (it is the scale times the share of codes that are not
zero).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phase4_bitnet.architecture_config import DecoderConfig
from phase4_bitnet.architectures import Decoder
from phase4_bitnet.inference import evaluation_codes
from phase4_bitnet.layers import TernaryWeight


@dataclass(frozen=True, kw_only=True)
class Ternary:
    """A ternary weight.

    Args:
        codes: (out, in) int8.
        scale: the one scale; float16 holds it exactly.
        bias: (out,) or None.
        norm: the layer divides its input by its root mean square first.
    """

    codes: Tensor
    scale: float
    bias: Tensor | None = None
    norm: bool = False


Weights = dict[str, "Ternary | Tensor"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A causal language model in Hugging Face's terms.

    Args:
        config: what config.json holds, without quantization_config.
        weights: by the name of the module for a ternary layer ("model.layers.0.mlp.up_proj"), by the name of
            the parameter for what stays float ("model.norm.weight").
    """

    config: Mapping[str, Any]
    weights: Weights


def ternary_of(layer: TernaryWeight) -> Ternary:
    """What a layer's forward uses in evaluation mode, on the CPU."""
    codes, scale = evaluation_codes(layer)
    bias = getattr(layer, "bias", None)
    return Ternary(
        codes=codes.detach().cpu(),
        scale=float(scale),
        bias=None if bias is None else bias.detach().float().cpu(),
        norm=bool(getattr(layer, "norm", False)),
    )


def decoder_layout(model: Decoder) -> Layout:
    """The layout of a reference decoder.

    A "llama" is a LlamaForCausalLM. A "decoder" is a BitNetForCausalLM: that one multiplies act(gate) by up,
    ours squares relu(up), which is the same with gate = up and the activation "relu"; so up is stored twice.

    Args:
        model: a `Decoder` or `Llama` that predicts the next token.

    Raises:
        ValueError: the model has another head.
    """
    config = model.config
    if config.pooled:
        raise ValueError(
            f"the {config.architecture} has a head for "
            f"{'classes' if config.num_classes else 'values'}, and this format holds models that predict the "
            "next token; use the format onnx or torch"
        )
    weights: Weights = {"model.embed_tokens.weight": _float(model.embed_tokens.weight)}
    for i, block in enumerate(model.layers):
        weights |= _block_weights(block, f"model.layers.{i}.", config)
    weights["model.norm.weight"] = _float(model.norm.weight)
    if not config.tie_embeddings:
        weights["lm_head.weight"] = _float(model.head.weight)
    return Layout(config=_hf_config(config), weights=weights)


def _block_weights(block: Any, prefix: str, config: DecoderConfig) -> Weights:
    attention, mlp = block.self_attn, block.mlp
    weights: Weights = {}
    for name in ("input_layernorm", "post_attention_layernorm"):
        weights[f"{prefix}{name}.weight"] = _float(getattr(block, name).weight)
    for name, part in zip(("q_proj", "k_proj", "v_proj"), _split(attention.qkv_proj, 3), strict=True):
        _add(weights, f"{prefix}self_attn.{name}", part)
    _add(weights, f"{prefix}self_attn.o_proj", _split(attention.o_proj, 1)[0])
    gate, up = _split(mlp.gate_up_proj, 2) if config.gated else _split(mlp.up_proj, 1) * 2
    _add(weights, f"{prefix}mlp.gate_proj", gate)
    _add(weights, f"{prefix}mlp.up_proj", up)
    _add(weights, f"{prefix}mlp.down_proj", _split(mlp.down_proj, 1)[0])
    if not config.gated:
        weights[f"{prefix}self_attn.attn_sub_norm.weight"] = _float(attention.attn_sub_norm.weight)
        weights[f"{prefix}mlp.ffn_sub_norm.weight"] = _float(mlp.ffn_sub_norm.weight)
    return weights


def _split(layer: nn.Linear, parts: int) -> list[Ternary | Tensor]:
    if not isinstance(layer, TernaryWeight):
        return list(_float(layer.weight).chunk(parts))
    whole = ternary_of(layer)
    return [Ternary(codes=codes, scale=whole.scale) for codes in whole.codes.chunk(parts)]


def _add(weights: Weights, name: str, weight: Ternary | Tensor) -> None:
    weights[name if isinstance(weight, Ternary) else f"{name}.weight"] = weight


def _float(parameter: Tensor) -> Tensor:
    return parameter.detach().float().cpu().clone(memory_format=torch.contiguous_format)


def _hf_config(config: DecoderConfig) -> dict[str, Any]:
    kind = ("LlamaForCausalLM", "llama") if config.gated else ("BitNetForCausalLM", "bitnet")
    return {
        "architectures": [kind[0]],
        "model_type": kind[1],
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "hidden_act": "silu" if config.gated else "relu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        # The first is what transformers 5 reads, the second what 4 does.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "rope_theta": config.rope_base,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "pad_token_id": config.pad_id,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
