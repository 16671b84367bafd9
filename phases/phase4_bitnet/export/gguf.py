"""GGUF: the file of llama.cpp, with ternary weights as TQ2_0 or TQ1_0.

A block of either type holds 256 codes of one row and the scale in float16. Both are written from the codes;
the library's quantizer is not used, though it would give the same bytes, since a second quantization is a
second chance to differ.

    TQ2_0  66 bytes  byte m of half j holds the codes 128 j + m + 32 i, i < 4, at bits 2 i; then the scale
    TQ1_0  54 bytes  48 bytes of five codes and 4 of four, in base 3, the first code the highest digit; scale

A byte of TQ1_0 is not the base-3 number q but ceil(256 q / 243): read as the fraction byte / 256 it gives
its digits one after another, each by a multiplication with 3.

Source: ggml-org/llama.cpp `ggml/src/ggml-common.h` (block_tq1_0, block_tq2_0), `ggml/src/ggml-quants.c`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from phase4_bitnet.export.byte_tokenizer import BYTES, END, byte_characters
from phase4_bitnet.export.huggingface import layout_of
from phase4_bitnet.export.layout import Layout, Ternary
from phase4_bitnet.export.libraries import optional, required, version_of
from phase4_bitnet.export.llama_engine import log_probabilities_apart
from phase4_bitnet.export.report import ExportReport, make_report, new_file
from phase4_bitnet.export.samples import outputs_of, sample_for
from phase4_bitnet.packing import pack_codes
from phase4_bitnet.store import unwrap

BLOCK = 256
TYPES = ("TQ2_0", "TQ1_0", "F16")
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_NO_VOCABULARY = "The file has no vocabulary: llama.cpp decodes token ids with it, and its server needs one."


def export_gguf(
    model: nn.Module,
    file: str | Path,
    *,
    tensor_type: str = "TQ2_0",
    name: str = "forge",
    sample: Tensor | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a Llama decoder as a GGUF file that llama.cpp loads and generates from.

    A vocabulary of 256 tokens is taken for bytes and written as such, and byte 0 ends a text. Other
    vocabularies are left out of the file: llama.cpp then takes and gives token ids.

    The file holds exactly the model's codes and scales. What llama.cpp computes with TQ2_0 and TQ1_0 differs
    from the model in how it rounds activations: to int8 by the largest magnitude of 256 values, and by that
    of the whole row here. With F16 it does not round them to int8 at all. The report has the difference.

    Args:
        model: a `Llama` of ours, or Hugging Face's LlamaForCausalLM whose linear layers are BitLinear made
            with ``norm=False``.
        file: where to write, as "model.gguf".
        tensor_type: of the ternary weights: "TQ2_0" (2.06 bits a weight), "TQ1_0" (1.69 bits), or "F16",
            which takes rows of any length.
        name: shown by tools that read the file.
        sample: (rows, length) token ids to compare outputs on; random ones by default.
        overwrite: replace a file of that name.

    Returns:
        Size, and the largest difference of log-probabilities after each row of the sample, computed by
        llama.cpp where the package xllamacpp is installed.

    Raises:
        ValueError: the model is not one that llama.cpp's "llama" computes, a row is not made of whole
            blocks, the file read back is not the model, or the package gguf is missing.
        FileExistsError: the file exists and `overwrite` is False.

    Example:
        >>> import tempfile
        >>> from phase4_bitnet import build_model
        >>> model = build_model("llama", vocab_size=256, dim=256, layers=1, mlp_ratio=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = export_gguf(model, f"{folder}/model.gguf")
        >>> report.bytes < report.float_bytes / 3
        True
    """
    gguf = required("gguf", "gguf", "gguf")
    if tensor_type not in TYPES:
        raise ValueError(f"tensor_type={tensor_type!r} is not known; use one of {', '.join(TYPES)}")
    model = unwrap(model)
    layout = layout_of(model)
    _check(layout, tensor_type)
    path = Path(file)
    with new_file(path, overwrite) as temporary:
        writer = gguf.GGUFWriter(str(temporary), "llama")
        _write_config(gguf, writer, layout.config, tensor_type, name)
        heads = {
            "self_attn.q_proj": layout.config["num_attention_heads"],
            "self_attn.k_proj": layout.config["num_key_value_heads"],
        }
        for key, weight in layout.weights.items():
            part = key.split(".", 3)[-1]
            if part.removesuffix(".weight") in heads:
                weight = _interleaved(weight, heads[part.removesuffix(".weight")])
            _write_tensor(gguf, writer, _tensor_name(key), weight, tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _read_back(gguf, temporary, layout)
        sample = sample_for(model) if sample is None else sample
        outputs = None
        if layout.config["vocab_size"] == BYTES and optional("xllamacpp") is not None:
            # llama.cpp wants room for one more token.
            sample = sample[:, : layout.config["max_position_embeddings"] - 1]
            ours = outputs_of(model, sample)[:, -1].float().log_softmax(-1)
            outputs = ours, torch.tensor(log_probabilities_apart(temporary, sample.tolist(), BYTES))
    checked = version_of("xllamacpp") if outputs else version_of("gguf")
    notes = () if layout.config["vocab_size"] == BYTES else (_NO_VOCABULARY,)
    return make_report("gguf", path, model, checked, outputs, notes)


def blocks_of(codes: np.ndarray, scale: float, tensor_type: str) -> np.ndarray:
    """Codes and scale as the bytes of a ternary type.

    Args:
        codes: (rows, 256 n) int8.
        scale: exact in float16.
        tensor_type: "TQ2_0" or "TQ1_0".

    Returns:
        (rows, 66 n) uint8 for TQ2_0, (rows, 54 n) for TQ1_0.

    >>> codes = np.array([[1] * 240 + [0] * 16], dtype=np.int8)
    >>> blocks_of(codes, 0.5, "TQ2_0")[0, [0, 47, 48, 63, 64, 65]].tolist()
    [170, 170, 106, 106, 0, 56]
    >>> blocks_of(codes, 0.5, "TQ1_0")[0, [0, 47, 48, 51, 52, 53]].tolist()
    [255, 255, 127, 127, 0, 56]
    """
    blocks = _BLOCKS[tensor_type](codes.reshape(codes.shape[0], -1, BLOCK))
    half = np.broadcast_to(np.array([scale], dtype="<f2").view(np.uint8), (*blocks.shape[:2], 2))
    return np.concatenate([blocks, half], axis=-1).reshape(codes.shape[0], -1)


def _tq2_0(codes: np.ndarray) -> np.ndarray:
    """(rows, blocks, 256) int8 to (rows, blocks, 64) uint8."""
    # (row, block, half, i, m) -> (row, block, half, m, i): the four codes of a byte side by side.
    ordered = codes.reshape(*codes.shape[:2], 2, 4, 32).swapaxes(-1, -2)
    packed = pack_codes(torch.from_numpy(np.ascontiguousarray(ordered))).numpy()
    return packed.reshape(*codes.shape[:2], BLOCK // 4)


def _tq1_0(codes: np.ndarray) -> np.ndarray:
    """(rows, blocks, 256) int8 to (rows, blocks, 52) uint8."""
    digits = (codes + 1).astype(np.uint16)
    parts = []
    for start, end, width in ((0, 160, 32), (160, 240, 16), (240, 256, 4)):
        columns = digits[..., start:end].reshape(*digits.shape[:2], -1, width)
        number = np.zeros((*digits.shape[:2], width), dtype=np.uint16)
        for i in range(5):  # the last bytes have four codes, and 0 for the fifth digit
            number *= 3
            if i < columns.shape[2]:
                number += columns[:, :, i]
        parts.append(((256 * number.astype(np.uint32) + 242) // 243).astype(np.uint8))
    return np.concatenate(parts, axis=-1)


_BLOCKS = {"TQ2_0": _tq2_0, "TQ1_0": _tq1_0}


def _check(layout: Layout, tensor_type: str) -> None:
    config = layout.config
    if config["model_type"] == "bitnet":
        raise ValueError(
            "llama.cpp computes a BitNetForCausalLM (our 'decoder') with SiLU whatever its activation, so "
            "that the file would be another function; train with model='llama' (architecture='llama', with "
            "the options of 'decoder'), or use the format huggingface, onnx or torch"
        )
    if config["model_type"] != "llama":
        raise ValueError(
            f"a model of the kind {config['model_type']!r} has no GGUF form here, only Llama's blocks do; "
            "train with model='llama', or use the format huggingface, onnx or torch"
        )
    if config["architectures"] != ["LlamaForCausalLM"]:
        raise ValueError(
            f"a {config['architectures'][0]} has another head than llama.cpp's Llama, which predicts the "
            "next token; use a LlamaForCausalLM, or the format onnx or torch"
        )
    if config["hidden_act"] != "silu":
        raise ValueError(
            f"hidden_act={config['hidden_act']!r} is not what llama.cpp computes for a Llama; use 'silu', or "
            "the format huggingface, onnx or torch"
        )
    rope = (config.get("rope_parameters") or {}).get("rope_type", "default")
    if rope != "default":
        raise ValueError(f"rope_type={rope!r} is not written to GGUF; use the default rotary positions")
    if config.get("head_dim") not in (None, config["hidden_size"] // config["num_attention_heads"]):
        raise ValueError(
            f"head_dim={config['head_dim']} is not hidden_size / num_attention_heads; GGUF needs it so"
        )
    for key, weight in layout.weights.items():
        if key.endswith(".bias") or getattr(weight, "bias", None) is not None:
            raise ValueError(f"{key}: has a bias, which is not written to GGUF; train without biases")
        if not isinstance(weight, Ternary):
            continue
        if weight.norm:
            raise ValueError(
                f"{key}: normalizes its input, and llama.cpp does not; convert the model with "
                "convert_model_to_bitnet(model, norm=False) before training"
            )
        if float(np.float16(weight.scale)) != weight.scale:
            raise ValueError(f"{key}: scale {weight.scale} is not exact in float16; requantize the layer")
        if tensor_type in _BLOCKS and weight.codes.shape[1] % BLOCK:
            raise ValueError(
                f"{key}: rows of {weight.codes.shape[1]} weights are not made of {tensor_type}'s blocks of "
                f"{BLOCK}; use tensor_type='F16' (16 bits a weight), or a model whose dim and dim * "
                f"mlp_ratio are multiples of {BLOCK}"
            )


def _write_config(gguf: Any, writer: Any, config: Mapping[str, Any], tensor_type: str, name: str) -> None:
    writer.add_name(name)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{tensor_type}"])
    if config["vocab_size"] != BYTES:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(byte_characters())
    writer.add_token_types([gguf.TokenType.NORMAL] * BYTES)
    # llama.cpp wants the list, and gguf cannot write an empty one: a pair of characters that stand for no
    # byte.
    writer.add_token_merges(["\u2205 \u2205"])
    writer.add_bos_token_id(END)
    writer.add_eos_token_id(END)
    writer.add_add_bos_token(False)


def _tensor_name(key: str) -> str:
    """The name in GGUF of a tensor of Hugging Face's Llama."""
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if key in fixed:
        return fixed[key]
    _, _, block, part = key.split(".", 3)
    return f"blk.{block}.{_NAMES[part.removesuffix('.weight')]}.weight"


def _interleaved(weight: Ternary | Tensor, heads: int) -> Any:
    """Rows of each head in the order of llama.cpp's rotation, which turns neighbors and not halves."""
    rows = weight.codes if isinstance(weight, Ternary) else weight
    ordered = rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return Ternary(codes=ordered, scale=weight.scale) if isinstance(weight, Ternary) else ordered


def _write_tensor(gguf: Any, writer: Any, name: str, weight: Ternary | Tensor, tensor_type: str) -> None:
    if not isinstance(weight, Ternary):
        writer.add_tensor(name, weight.numpy())
    elif tensor_type in _BLOCKS:
        blocks = blocks_of(weight.codes.numpy(), weight.scale, tensor_type)
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[tensor_type])
    else:
        writer.add_tensor(name, (weight.codes.float() * weight.scale).numpy().astype(np.float16))


def _read_back(gguf: Any, path: Path, layout: Layout) -> None:
    """Hold what the library dequantizes from the file against codes times scale, to the bit."""
    stored = {t.name: t for t in gguf.GGUFReader(str(path)).tensors}
    config = layout.config
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for key, weight in layout.weights.items():
        name = _tensor_name(key)
        kind = name.split(".")[-2]
        if kind in heads:
            weight = _interleaved(weight, heads[kind])
        wanted = (weight.codes.float() * weight.scale if isinstance(weight, Ternary) else weight).numpy()
        tensor = stored[name]
        if not np.array_equal(gguf.dequantize(tensor.data, tensor.tensor_type).reshape(wanted.shape), wanted):
            raise ValueError(
                f"{path}: {name} read back is not what was written; the disk or gguf is at fault"
            )
