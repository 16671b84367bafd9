"""The model of a run: taken as given or built by name, made ternary, checked against the data."""

import contextlib
import dataclasses
import importlib
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phase4_bitnet.architecture_config import TernaryConfig
from phase4_bitnet.architectures import REGISTRY, build_model
from phase4_bitnet.convert import convert_model_to_bitnet
from phase4_bitnet.export import load_huggingface
from phase4_bitnet.layers import BitLinear, TernaryWeight, ternary_layers
from phase4_bitnet.packing import packed_bytes
from phase4_bitnet.store import MANIFEST, load_compressed_model, session_folder
from phase5_training.batches import rows_of, to_device
from phase5_training.config import TrainingConfig
from phase5_training.errors import ForgeError, UsageError, nearest_match
from phase5_training.loss_registry import Loss
from phase5_training.modes import eval_mode
from phase5_training.outputs import IGNORE_INDEX, unwrap_outputs
from phase5_training.pipeline.formats.spec import InputKind, check_input_kind

# What the inputs of a reference architecture are.
READS: dict[str, InputKind] = {name: "features" if name == "mlp" else "tokens" for name in REGISTRY}
# More classes than any real data set has: the labels are identifiers, not classes.
MAX_CLASSES = 1_000_000


def prepare_model(given: nn.Module | Mapping[str, Any] | str, config: TrainingConfig, spec: Any) -> nn.Module:
    """The model to train, ternary where the configuration says so.

    Args:
        given: a module, the dictionary of phase 4 ({"model": ..., "metrics": ...}), or a name: "auto",
            a reference architecture, the folder or id of a saved session, a folder of transformers, or
            "package.module:function".
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
    if not isinstance(given, str):
        _refuse_options(type(model).__name__, config)
    ternary = any(True for _ in ternary_layers(model))
    if not config.use_bitnet:
        if ternary:
            raise UsageError("use_bitnet=False and the model has ternary layers; give the float model")
        return model
    if ternary:
        # Made ternary before, by phase 4 or as a reference architecture: its own choice of layers holds.
        return _with_mode(model, config)
    try:
        return convert_model_to_bitnet(
            model,
            skip=config.float_layers,
            weight_bits=config.weight_bits,
            quantization_mode=config.quantization_mode,
            activation_bits=config.activation_bits,
            backward=config.backward,
        )
    except ValueError as error:
        advice = str(error).replace("skip=()", "float_layers=[]").replace("skip=", "float_layers=")
        raise UsageError(f"{advice}, or use_bitnet=False to train it in float") from None


def _with_mode(model: nn.Module, config: TrainingConfig) -> nn.Module:
    if config.float_layers is not None:
        raise UsageError(
            "float_layers choose what to convert, and the model is ternary already; leave it out"
        )
    for name, layer in ternary_layers(model):
        if layer.weight_bits != config.weight_bits:
            raise UsageError(
                f"layer {name!r} has {layer.weight_bits}-bit weights and weight_bits={config.weight_bits}; "
                f"use weight_bits={layer.weight_bits}, or give the float model"
            )
        layer.quantization_mode = config.quantization_mode
        if isinstance(layer, BitLinear) and config.backward != "auto":
            layer.backward = config.backward
    own = getattr(model, "config", None)
    if isinstance(own, TernaryConfig):
        # The stored model is rebuilt from this.
        changed: dict[str, str] = {"quantization_mode": config.quantization_mode}
        if config.backward != "auto":
            changed["backward"] = config.backward
        model.config = dataclasses.replace(own, **changed)  # type: ignore[assignment, arg-type]
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
    if ":" in name:
        _refuse_options(name, config)
        return _from_function(name)
    folder = Path(name)
    if not folder.is_dir():
        with contextlib.suppress(ValueError):  # not even the form of a session's id
            folder = session_folder(name)
    if not folder.is_dir():
        near = nearest_match(name, ["auto", *REGISTRY])
        hint = f"did you mean {near!r}? " if near else ""
        raise UsageError(
            f"model {name!r} is unknown; {hint}use auto, {', '.join(REGISTRY)}, the folder of a saved model "
            "or of one of transformers, or package.module:function"
        )
    _refuse_options(name, config)
    try:
        if is_huggingface(folder):
            return load_huggingface(folder)
        return load_compressed_model(folder).train()
    except ValueError as error:
        raise UsageError(str(error)) from None


def is_huggingface(folder: str | Path) -> bool:
    """Whether a folder holds a model of transformers: it has their config.json, and not our manifest."""
    return (Path(folder) / "config.json").is_file() and not (Path(folder) / MANIFEST).is_file()


def _refuse_options(name: str, config: TrainingConfig) -> None:
    if config.model_options:
        raise UsageError(
            f"model_options build a {' or '.join(REGISTRY)}, and the model is {name!r}; leave them out"
        )


def _from_function(name: str) -> nn.Module:
    module_name, _, function_name = name.partition(":")
    try:
        make = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # the user's module may fail in any way
        hint = "; is its folder on PYTHONPATH?" if isinstance(error, ImportError) else ""
        raise UsageError(
            f"model {name!r} cannot be imported: {type(error).__name__}: {error}{hint}"
        ) from error
    try:
        model = make()
    except Exception as error:
        raise UsageError(
            f"model {name!r} failed: {type(error).__name__}: {error}; wanted a function without arguments"
        ) from error
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
        if outputs > MAX_CLASSES:
            raise UsageError(
                f"labels go up to {outputs - 1}, over {MAX_CLASSES} classes; number the labels from 0, or "
                "pass a model of your own"
            )
    elif spec.target_kind == "float":
        outputs = math.prod(spec.target_shape) or 1
    elif spec.target_kind == "multi":
        raise UsageError(
            "data with several targets need a model of your own that returns a dict of outputs; pass model="
        )
    check_input_kind(READS[name], spec.input_kind, text=spec.tokenizer is not None)
    if name == "mlp":
        if outputs is None:
            raise UsageError(
                "the mlp gives one output per sample and these data want one per token; use decoder"
            )
        if None in spec.input_shape:
            raise UsageError("the mlp needs inputs of one length and these vary; use model='decoder'")
        return {**options, "in_features": math.prod(spec.input_shape), "num_outputs": outputs}
    fixed = spec.input_shape[0] if spec.input_shape else None
    longest = fixed or spec.max_length or config.max_length or 256
    kind = {"class": "num_classes", "float": "num_outputs"}.get(spec.target_kind)
    # Padding is a token that the model is given, whether or not the data hold it.
    pad_id = spec.pad_id if spec.ragged else None
    return {
        **options,
        "vocab_size": max(spec.vocab_size or 1, (spec.max_token or 0) + 1, (pad_id or 0) + 1),
        # Batches are padded to a multiple of 8.
        "max_length": -(-longest // 8) * 8,
        "pad_id": pad_id,
        **({kind: outputs} if kind else {}),
    }


def check_against_data(
    model: nn.Module, loss: Loss, batch: Mapping[str, Any], spec: Any, device: torch.device
) -> None:
    """Run two samples through model and loss, and compare what comes out with what the data hold.

    Args:
        model, loss: on the device.
        batch: of the data.
        spec: what the data are.
        device: where to compute.

    Raises:
        UsageError: the model refuses the input, has too few outputs for the labels or too few
            embeddings for the tokens, or returns another shape than the targets have.
    """
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    top = spec.max_token if spec.input_kind == "tokens" else None
    what = f"the data hold token {top}"
    if top is not None and spec.ragged and (spec.pad_id or 0) > top:
        top, what = spec.pad_id, f"padding is token {spec.pad_id}"
    if embedding is not None and top is not None and top >= embedding.num_embeddings:
        raise UsageError(
            f"{what} and the model embeds {embedding.num_embeddings} tokens "
            f"(0 to {embedding.num_embeddings - 1}); build it with vocab_size={top + 1}"
        )
    if spec.task == "next_token" and bool((batch["target"] == IGNORE_INDEX).all()):
        raise UsageError(
            "no sample of the first batch has a token to predict: where records have text targets only those "
            "are learned, and here max_length cuts them off; raise max_length, or leave out the targets"
        )
    few = to_device(rows_of(batch, slice(2)), device)
    devices = []
    if device.type == "cuda":
        devices = [torch.cuda.current_device() if device.index is None else device.index]
    idle = dict(ternary_layers(model))
    watching = [
        layer.register_forward_pre_hook(lambda module, inputs, name=name: idle.pop(name, None) and None)
        for name, layer in idle.items()
    ]
    try:
        with torch.random.fork_rng(devices), eval_mode(model), torch.no_grad():
            outputs = model(few["input"])
            if loss.kind != "custom":  # a loss of one's own may want outputs of any shape
                _check_outputs(unwrap_outputs(outputs, few["target"]), few["target"], spec)
            loss(outputs, few)
    except ForgeError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise UsageError(
            f"the model and its loss cannot take the data: input of shape {_shape(few['input'])} and "
            f"target of shape {_shape(few['target'])} (two samples) give {type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}"
        ) from error
    finally:
        for hook in watching:
            hook.remove()
    if idle:
        warnings.warn(
            f"{len(idle)} ternary layers were not called for two samples, {next(iter(idle))!r} first; where "
            "a model reads a weight directly it trains in float: name those layers in float_layers",
            stacklevel=2,
        )


def check_monitor(monitor: str, figures: Mapping[str, Any]) -> None:
    """Whether validation measures the figure that early stopping is to go by.

    Args:
        monitor: the figure's name.
        figures: of a validation.

    Raises:
        UsageError: it is not measured for this task; names the nearest that is.
    """
    # r2 has no value where the first targets happen to be equal.
    known = [
        k for k, v in figures.items() if k not in ("samples", "units") and (v is not None or k[-2:] == "r2")
    ]
    if monitor not in known:
        near = nearest_match(monitor, known)
        hint = f"did you mean {near!r}?" if near else f"use one of {', '.join(known)}"
        raise UsageError(f"monitor={monitor!r} is not measured for this task; {hint}")


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
    """Parameters, and megabytes in float32 and with ternary layers packed 2 bits a weight, rows padded."""
    total = sum(p.numel() for p in model.parameters())
    latents = {id(m.weight): m.weight for m in model.modules() if isinstance(m, TernaryWeight)}.values()
    ternary = sum(w.numel() for w in latents)
    # Convolutions are packed a row per output channel.
    packed = (total - ternary) * 4 + sum(packed_bytes((w.shape[0], w.numel() // w.shape[0])) for w in latents)
    return {
        "class": type(model).__name__,
        "parameters": total,
        "ternary_parameters": ternary,
        "float_mb": total * 4 / 1e6,
        "packed_mb": packed / 1e6,
    }


def _shape(value: Any) -> Any:
    return {k: _shape(v) for k, v in value.items()} if isinstance(value, Mapping) else tuple(value.shape)
