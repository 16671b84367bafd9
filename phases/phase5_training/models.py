"""The model of a run: taken as given or built by name, made ternary, checked against the data."""

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phase4_bitnet.architectures import REGISTRY, build_model
from phase4_bitnet.convert import convert_model_to_bitnet
from phase4_bitnet.layers import TernaryWeight, ternary_layers
from phase4_bitnet.store import load_compressed_model, session_folder
from phase5_training.config import TrainingConfig
from phase5_training.errors import UsageError, nearest_match
from phase5_training.outputs import unwrap_outputs


def prepare_model(given: nn.Module | Mapping[str, Any] | str, config: TrainingConfig, spec: Any) -> nn.Module:
    """The model to train, ternary where the configuration says so.

    Args:
        given: a module, the dictionary of phase 4 ({"model": ..., "metrics": ...}), or a name: "auto",
            a reference architecture, the folder or id of a saved session, or "package.module:function".
        config: use_bitnet and its options; model_options for a reference architecture.
        spec: what the data are.

    Raises:
        UsageError: no such model, options that do not fit, or a model with nothing to make ternary.
    """
    model: Any = given
    if isinstance(given, Mapping):
        model = given.get("model")
        if not isinstance(model, nn.Module):
            raise UsageError(
                "model is a dictionary without a module under 'model'; pass all of phase 4's output"
            )
    if isinstance(model, str):
        model = _by_name(model, config, spec)
    if not isinstance(model, nn.Module):
        raise UsageError(f"model is a {type(model).__name__}; pass an nn.Module or a name")
    if not config.use_bitnet:
        return model
    if any(True for _ in ternary_layers(model)):
        # Made ternary before, by phase 4 or as a reference architecture: its own choice of layers holds.
        return _with_mode(model, config)
    try:
        return convert_model_to_bitnet(
            model,
            skip=config.float_layers,
            weight_bits=config.weight_bits,
            quantization_mode=config.quantization_mode,
            activation_bits=config.activation_bits,
        )
    except ValueError as error:
        raise UsageError(f"{error}, or use_bitnet=False to train it in float") from None


def _with_mode(model: nn.Module, config: TrainingConfig) -> nn.Module:
    for name, layer in ternary_layers(model):
        if layer.weight_bits != config.weight_bits:
            raise UsageError(
                f"layer {name!r} has {layer.weight_bits}-bit weights and weight_bits={config.weight_bits}; "
                f"use weight_bits={layer.weight_bits}, or give the float model"
            )
        layer.quantization_mode = config.quantization_mode
    return model


def _by_name(name: str, config: TrainingConfig, spec: Any) -> nn.Module:
    if name == "auto":
        name = "decoder" if spec.input_kind == "tokens" else "mlp"
    if name in REGISTRY:
        options = {**_options_from_data(name, config, spec), **config.model_options}
        try:
            return build_model(name, **options)
        except ValueError as error:
            raise UsageError(f"model_options: {error}") from None
    if config.model_options:
        raise UsageError(f"model_options belong to {' and '.join(REGISTRY)}, and model is {name!r}")
    if ":" in name:
        return _from_function(name)
    folder = Path(name) if Path(name).is_dir() else session_folder(name)
    if not folder.is_dir():
        near = nearest_match(name, ["auto", *REGISTRY])
        hint = f"did you mean {near!r}? " if near else ""
        raise UsageError(
            f"model {name!r} is unknown; {hint}use auto, {', '.join(REGISTRY)}, the folder of a saved model, "
            "or package.module:function"
        )
    try:
        return load_compressed_model(folder).train()
    except ValueError as error:
        raise UsageError(str(error)) from None


def _from_function(name: str) -> nn.Module:
    module_name, _, function_name = name.partition(":")
    try:
        model = getattr(importlib.import_module(module_name), function_name)()
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"model {name!r} cannot be imported: {error}; is its folder on PYTHONPATH?"
        ) from None
    if not isinstance(model, nn.Module):
        raise UsageError(f"model {name!r} returned a {type(model).__name__}; wanted an nn.Module")
    return model


def _options_from_data(name: str, config: TrainingConfig, spec: Any) -> dict[str, Any]:
    """What the data decide: sizes of inputs and outputs."""
    options: dict[str, Any] = {
        "ternary": config.use_bitnet,
        "weight_bits": config.weight_bits,
        "quantization_mode": config.quantization_mode,
        "activation_bits": config.activation_bits,
    }
    outputs = None
    if spec.target_kind == "class":
        outputs = max(2, spec.num_classes)
    elif spec.target_kind == "float":
        outputs = math.prod(spec.target_shape) or 1
    elif spec.target_kind == "multi":
        raise UsageError(
            "data with several targets need a model of your own that returns a dict of outputs; pass model="
        )
    if name == "mlp":
        if outputs is None:
            raise UsageError(
                "the mlp gives one output per sample and these data want one per token; use decoder"
            )
        if None in spec.input_shape:
            raise UsageError("the mlp needs inputs of one length and these vary; use model='decoder'")
        return {**options, "in_features": math.prod(spec.input_shape), "num_outputs": outputs}
    if spec.input_kind != "tokens":
        raise UsageError(
            f"the decoder reads token ids and the inputs are {spec.input_dtype} features; use model='mlp'"
        )
    fixed = spec.input_shape[0] if spec.input_shape else None
    longest = fixed or spec.max_length or config.max_length or 256
    kind = {"class": "num_classes", "float": "num_outputs"}.get(spec.target_kind)
    return {
        **options,
        "vocab_size": max(spec.vocab_size or 1, (spec.max_token or 0) + 1),
        # Batches are padded to a multiple of 8.
        "max_length": -(-longest // 8) * 8,
        "pad_id": spec.pad_id if spec.ragged else None,
        **({kind: outputs} if kind else {}),
    }


def check_against_data(model: nn.Module, batch: Mapping[str, Any], spec: Any, device: torch.device) -> None:
    """Run two samples through the model and compare what comes out with what the data hold.

    Raises:
        UsageError: the model refuses the input, has too few outputs for the labels or too few
            embeddings for the tokens, or returns another shape than the targets have.
    """
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    top = spec.max_token if spec.input_kind == "tokens" else None
    if embedding is not None and top is not None and top >= embedding.num_embeddings:
        raise UsageError(
            f"the data hold token {top} and the model embeds {embedding.num_embeddings} tokens "
            f"(0 to {embedding.num_embeddings - 1}); build it with vocab_size={top + 1}"
        )
    few = {k: _first_rows(v, device) for k, v in batch.items()}
    modes = {m: m.training for m in model.modules()}
    generator = torch.get_rng_state()
    try:
        model.eval()
        with torch.no_grad():
            outputs = unwrap_outputs(model(few["input"]))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UsageError(
            f"the model cannot take the data: input of shape {_shape(few['input'])} per batch of two gives "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    finally:
        torch.set_rng_state(generator)
        for module, training in modes.items():
            module.training = training
    _check_outputs(outputs, few["target"], spec)


def _check_outputs(outputs: Any, target: Any, spec: Any) -> None:
    if isinstance(target, Mapping):
        if not isinstance(outputs, Mapping) or set(target) - set(outputs):
            wanted = ", ".join(map(str, target))
            raise UsageError(f"the data have targets {wanted}; the model must return a dict with those keys")
        for name, own in target.items():
            _check_outputs(outputs[name], own, spec.targets[name])
        return
    if not isinstance(outputs, Tensor):
        raise UsageError(f"the model returned a {type(outputs).__name__}; wanted a tensor, or .logits")
    if target.is_floating_point():
        if outputs.numel() != target.numel():
            raise UsageError(
                f"the model gives shape {tuple(outputs.shape)} for targets of shape {tuple(target.shape)} "
                f"(two samples); give it {target.numel() // len(target)} outputs per sample"
            )
        return
    if tuple(outputs.shape[:-1]) != tuple(target.shape):
        raise UsageError(
            f"the model gives shape {tuple(outputs.shape)} for labels of shape {tuple(target.shape)} (two "
            "samples); wanted the labels' shape with one more dimension, the classes"
        )
    labels = spec.label_range or ((0, spec.max_token) if spec.target_kind == "tokens" else None)
    if labels is not None:
        low, high = labels
        if high >= outputs.shape[-1] or low < 0:
            raise UsageError(
                f"labels go from {low} to {high} and the model has {outputs.shape[-1]} outputs "
                f"(labels 0 to {outputs.shape[-1] - 1}); build it with {high + 1} outputs, or mend the labels"
            )


def describe_layers(model: nn.Module) -> list[dict[str, Any]]:
    """One row per ternary layer: name, shape, bits, scale, share of zero codes."""
    return [
        {
            "name": name,
            "shape": list(layer.weight.shape),
            "bits": layer.weight_bits,
            "scale": float(layer.scale),
            "zero_share": float((layer.codes == 0).float().mean()),
        }
        for name, layer in ternary_layers(model)
    ]


def describe_size(model: nn.Module) -> dict[str, Any]:
    """Parameters, and megabytes in float32 and with ternary layers packed 2 bits a weight."""
    total = sum(p.numel() for p in model.parameters())
    ternary = sum(
        {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, TernaryWeight)}.values()
    )
    packed_bytes = (total - ternary) * 4 + ternary / 4
    return {
        "class": type(model).__name__,
        "parameters": total,
        "ternary_parameters": ternary,
        "float_mb": total * 4 / 1e6,
        "packed_mb": packed_bytes / 1e6,
    }


def _first_rows(value: Any, device: torch.device) -> Any:
    if isinstance(value, Mapping):
        return {k: _first_rows(v, device) for k, v in value.items()}
    return value[:2].to(device)


def _shape(value: Any) -> Any:
    return {k: _shape(v) for k, v in value.items()} if isinstance(value, Mapping) else tuple(value.shape)
