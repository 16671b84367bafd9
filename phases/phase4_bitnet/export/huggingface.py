"""Hugging Face: a folder that transformers loads, and such a folder as a model of ours.

Ternary weights are packed as transformers packs them: byte r of a column holds the codes of rows r, r + R, r
+ 2 R and r + 3 R at bits 0, 2, 4 and 6, R being a quarter of the rows. What `weight_scale` means depends on
the class that reads it: "autobitlinear" multiplies by it, so it is the scale; "bitlinear" divides by it, so
it is 1 / scale, and a file that does not say `linear_class` is read as the latter. So the class is always
written.

Source: huggingface/transformers `src/transformers/integrations/bitnet.py`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from phase4_bitnet.architectures import Decoder
from phase4_bitnet.convert import convert_model_to_bitnet
from phase4_bitnet.durable_folder import write_file, write_folder
from phase4_bitnet.export.byte_tokenizer import BYTES, tokenizer_config, tokenizer_json
from phase4_bitnet.export.layout import Layout, Ternary, Weights, decoder_layout, ternary_of
from phase4_bitnet.export.libraries import optional, required, version_of
from phase4_bitnet.export.report import ExportReport, make_report
from phase4_bitnet.export.samples import outputs_of, sample_for
from phase4_bitnet.layers import NORM_EPS, BitLinear, TernaryWeight, ternary_layers
from phase4_bitnet.packing import decode_2bit, pack_codes
from phase4_bitnet.store import latent_of, unwrap
from phase4_bitnet.ternary import storable_scale

CONFIG, WEIGHTS = "config.json", "model.safetensors"
LINEAR_CLASSES = ("autobitlinear", "bitlinear")
ROWS_PER_BYTE = 4


def export_huggingface(
    model: nn.Module,
    folder: str | Path,
    *,
    linear_class: str = "autobitlinear",
    tokenizer: str | Path | None = None,
    sample: Tensor | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a causal language model as a folder for transformers: config.json, packed weights, tokenizer.

    Our "llama" becomes a LlamaForCausalLM, our "decoder" a BitNetForCausalLM, a model of transformers itself
    stays what it is. transformers computes the same function: it rounds activations to int8 a row at a time
    as we do. Sums in float are in another order, so that a value which lies between two int8 steps may fall
    to the other.

    Args:
        model: a `Decoder` or `Llama` that predicts the next token, or a transformers model with BitLinear
            layers.
        folder: where to write.
        linear_class: "autobitlinear" unpacks the weights once, on loading; "bitlinear" keeps them packed and
            unpacks them in every forward.
        tokenizer: a tokenizer.json to put beside; None is that of bytes for a vocabulary of 256, else none.
        sample: (rows, length) token ids to compare outputs on; random ones by default.
        overwrite: replace the folder.

    Returns:
        Size and largest difference of logits, where transformers and accelerate are installed.

    Raises:
        ValueError: the model is of another kind, its layers have no such form, or what transformers loads is
            not what was written.
        FileExistsError: the folder exists and `overwrite` is False.

    Example:
        >>> import tempfile
        >>> from phase4_bitnet import build_model
        >>> model = build_model("llama", vocab_size=256, dim=64, layers=1)
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     report = export_huggingface(model, f"{parent}/model")
        ...     sorted(p.name for p in report.path.iterdir())
        ['config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json']
    """
    if linear_class not in LINEAR_CLASSES:
        raise ValueError(
            f"linear_class={linear_class!r} is not known; use one of {', '.join(LINEAR_CLASSES)}"
        )
    path, model = Path(folder), unwrap(model)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True, or another folder")
    layout = layout_of(model)
    tensors, quantization = _packed(layout.weights, linear_class, _float_linears(model))
    config = {**layout.config, **({"quantization_config": quantization} if quantization else {})}
    files = {CONFIG: _json(config), WEIGHTS: safetensors.torch.save(tensors, metadata={"format": "pt"})}
    if tokenizer is not None:
        files["tokenizer.json"] = Path(tokenizer).read_bytes()
    elif config["vocab_size"] == BYTES:
        files["tokenizer.json"] = _json(tokenizer_json())
    if "tokenizer.json" in files:
        files["tokenizer_config.json"] = _json(tokenizer_config())

    outputs = None

    def write(temporary: Path) -> None:
        nonlocal outputs
        for name, data in files.items():
            write_file(temporary / name, [data])
        # Before the folder takes its place: what does not load replaces nothing.
        if optional("transformers") is not None and optional("accelerate") is not None:
            inputs = sample_for(model) if sample is None else sample
            outputs = outputs_of(model, inputs), _loaded_outputs(temporary, path, layout, inputs)

    write_folder(path, write)
    checked = version_of("transformers") if outputs else None
    return make_report("huggingface", path, model, checked, outputs)


def load_huggingface(folder: str | Path) -> nn.Module:
    """Read a model of transformers from a folder, without network and without code from the folder.

    Args:
        folder: with config.json and *.safetensors. Weights that are packed ternary ones become
            :class:`BitLinear` with the same codes and scale, and latents that quantize to them; the scale is
            rounded to float16. Float weights stay float, for `convert_model_to_bitnet`.

    Returns:
        The model in float32, in training mode.

    Raises:
        ValueError: transformers is missing or does not know the class, another quantization, or files that
            do not fit.
    """
    path = Path(folder)
    transformers = required("transformers", "hf", "huggingface")
    try:
        config = json.loads((path / CONFIG).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path / CONFIG}: cannot be read ({error}); give a folder of transformers"
        ) from error
    quantization = config.pop("quantization_config", None) or {}
    kind = getattr(transformers, (config.get("architectures") or ["none"])[0], None)
    if kind is None:
        raise ValueError(
            f"{path / CONFIG}: architectures={config.get('architectures')} is no class of transformers"
        )
    if quantization.get("quant_method", "bitnet") != "bitnet":
        raise ValueError(
            f"{path}: is quantized by {quantization['quant_method']!r}; give float weights, or those of "
            "bitnet"
        )
    with _quiet(transformers):
        own = kind.config_class.from_dict(config)
        if not quantization or quantization.get("quantization_mode") == "online":
            model = kind.from_pretrained(path, config=own, local_files_only=True, dtype=torch.float32)
            if quantization:  # the file holds latents
                convert_model_to_bitnet(model, norm=_norm(quantization, {}, path))
            return model.train()
        model = kind(own).float()
    tensors = {
        k: v for p in sorted(path.glob("*.safetensors")) for k, v in safetensors.torch.load_file(p).items()
    }
    _fill_packed(model, tensors, quantization, path)
    return model.train()


def layout_of(model: nn.Module) -> Layout:
    """The layout of a reference decoder or of a model of transformers.

    Raises:
        ValueError: the model is neither, or has ternary layers without a form in transformers.
    """
    if isinstance(model, Decoder):
        layout = decoder_layout(model)
    elif hasattr(model, "save_pretrained") and hasattr(getattr(model, "config", None), "to_dict"):
        layout = _transformers_layout(model)
    else:
        raise ValueError(
            f"{type(model).__name__} is no causal language model of ours or of transformers; use the "
            "format onnx or torch, which take any module"
        )
    for name, layer in ternary_layers(model):
        if not isinstance(layer, BitLinear):
            raise ValueError(
                f"{name}: a {type(layer).__name__} has no form in this format; use onnx or torch"
            )
        if layer.activation_bits is None:
            raise ValueError(
                f"{name}: has float activations, and the readers of this format round them to int8; train "
                "with activation_bits=8, or use the format onnx or torch"
            )
    return layout


def _transformers_layout(model: Any) -> Layout:
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config |= {"architectures": [type(model).__name__], "dtype": "float32", "torch_dtype": "float32"}
    ternary = {name for name, _ in ternary_layers(model)}
    weights: Weights = {name: ternary_of(layer) for name, layer in ternary_layers(model)}
    seen: set[tuple[Any, ...]] = set()
    for key, value in model.state_dict().items():
        place = (value.data_ptr(), tuple(value.shape))
        if key.rpartition(".")[0] in ternary or (
            value.numel() and place in seen
        ):  # tied weights are stored once
            continue
        seen.add(place)
        value = value.detach().cpu().contiguous().clone()
        weights[key] = value.float() if value.is_floating_point() else value
    return Layout(config=config, weights=weights)


def _packed(
    weights: Weights, linear_class: str, floats: list[str]
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of the file, and what config.json says about them."""
    tensors: dict[str, Tensor] = {}
    ternary = {name: weight for name, weight in weights.items() if isinstance(weight, Ternary)}
    if len({weight.norm for weight in ternary.values()}) > 1:
        raise ValueError(
            "some layers normalize their input and some do not, and transformers knows one answer for "
            "all; convert the model with norm=True or norm=False"
        )
    for name, weight in weights.items():
        if not isinstance(weight, Ternary):
            tensors[name] = weight
            continue
        rows, columns = weight.codes.shape
        if rows % ROWS_PER_BYTE:
            raise ValueError(
                f"{name}: {rows} rows of codes do not fill bytes of {ROWS_PER_BYTE} rows; use a width "
                f"that is a multiple of {ROWS_PER_BYTE}"
            )
        tensors[f"{name}.weight"] = pack_rows(weight.codes)
        scale = torch.tensor([weight.scale])
        tensors[f"{name}.weight_scale"] = scale if linear_class == "autobitlinear" else 1 / scale
        if weight.bias is not None:
            # autobitlinear adds the bias before it multiplies by the scale.
            bias = weight.bias / scale if linear_class == "autobitlinear" else weight.bias
            tensors[f"{name}.bias"] = bias
        if weight.norm:
            tensors[f"{name}.rms_norm.weight"] = torch.ones(columns)
    if not ternary:
        return tensors, None
    return tensors, {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": "offline",
        "use_rms_norm": next(iter(ternary.values())).norm,
        "rms_norm_eps": NORM_EPS,
        "modules_to_not_convert": floats,
    }


def pack_rows(codes: Tensor) -> Tensor:
    """Codes four rows a byte, as transformers packs them.

    Args:
        codes: (4 R, columns) int8.

    Returns:
        (R, columns) uint8.

    >>> pack_rows(torch.tensor([[1], [0], [-1], [1], [1], [1], [1], [-1]], dtype=torch.int8)).tolist()
    [[162], [41]]
    """
    return pack_codes(codes.unflatten(0, (ROWS_PER_BYTE, -1)).permute(1, 2, 0).contiguous()).squeeze(-1)


def unpack_rows(packed: Tensor) -> Tensor:
    """Undo `pack_rows`.

    Args:
        packed: (R, columns) uint8.

    Returns:
        (4 R, columns) int8.
    """
    return decode_2bit(packed.unsqueeze(-1), ROWS_PER_BYTE).permute(2, 0, 1).flatten(0, 1).contiguous()


def _float_linears(model: nn.Module) -> list[str]:
    """Linear layers that transformers is to leave alone, by their names there."""
    if isinstance(model, Decoder):
        return ["lm_head"]
    return [
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, TernaryWeight)
    ]


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, default=str, ensure_ascii=False) + "\n").encode()


def _loaded_outputs(folder: Path, path: Path, layout: Layout, sample: Tensor) -> Tensor:
    """Logits of what transformers loads from a folder, whose weights have to be exactly those written.

    Args:
        folder: where the files are.
        path: where they will be, for messages.
        layout: what was written.
        sample: token ids.

    Raises:
        ValueError: something is missing, or a weight is another.
    """
    import transformers

    with _quiet(transformers), torch.compiler.set_stance("force_eager"):
        kind = getattr(transformers, layout.config["architectures"][0])
        loaded, info = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(problem):
                raise ValueError(
                    f"{path}: transformers reports {problem}: {sorted(map(str, info[problem]))[:3]}"
                )
        modules = dict(loaded.named_modules())
        for name, weight in layout.weights.items():
            if isinstance(weight, Ternary) and not _same(modules[name], weight):
                raise ValueError(f"{path}: {name} as transformers loads it has other codes or another scale")
        return outputs_of(loaded, sample)


def _same(module: Any, weight: Ternary) -> bool:
    codes, scale = module.weight, module.weight_scale
    if codes.dtype == torch.uint8:
        codes, scale = unpack_rows(codes), 1 / scale
    close = abs(float(scale) - weight.scale) <= 1e-6 * weight.scale
    return close and torch.equal(codes.to(torch.int8), weight.codes)


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without its progress bars and advice."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _norm(quantization: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> bool:
    if not quantization.get("use_rms_norm"):
        return False
    eps = quantization.get("rms_norm_eps", 1e-6)
    gains = [k for k, v in tensors.items() if k.endswith(".rms_norm.weight") and bool((v != 1).any())]
    if eps != NORM_EPS or gains:
        what = f"{gains[0]} is not all ones" if gains else f"rms_norm_eps={eps} is not {NORM_EPS}"
        raise ValueError(f"{path}: {what}, and the norm of BitLinear has no gain and that epsilon")
    return True


def _fill_packed(model: Any, tensors: dict[str, Tensor], quantization: Mapping[str, Any], path: Path) -> None:
    """Make the layers that are packed in the file ternary, and load everything."""
    suffix = ".weight_scale"
    names = [k.removesuffix(suffix) for k in tensors if k.endswith(suffix)]
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    unknown = sorted(set(names) - set(linears))
    if unknown or not names:
        raise ValueError(
            f"{path}: no linear layer {unknown[0] if unknown else ''!r}; the files do not fit config.json"
        )
    norm = _norm(quantization, tensors, path)
    convert_model_to_bitnet(model, skip=[n for n in linears if n not in names], norm=norm)
    divides = quantization.get("linear_class", "bitlinear") == "bitlinear"
    for name in names:
        scale = tensors.pop(name + suffix).float().reshape(())
        scale = storable_scale(1 / scale if divides else scale)
        codes = unpack_rows(tensors.pop(f"{name}.weight"))
        tensors.pop(f"{name}.rms_norm.weight", None)
        tensors |= {
            f"{name}.codes": codes,
            f"{name}.scale": scale,
            f"{name}.weight": latent_of(codes, scale),
        }
        if f"{name}.bias" in tensors and not divides:
            tensors[f"{name}.bias"] = tensors[f"{name}.bias"].float() * scale
    result = model.load_state_dict(tensors, strict=False)
    tied = (
        set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    )
    missing = [k for k in result.missing_keys if k not in tied]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"{path}: does not fit its config.json: missing {missing[:2]}, unknown "
            f"{result.unexpected_keys[:2]}"
        )
