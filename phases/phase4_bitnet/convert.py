"""Turn a float model into a ternary one, in place."""

import warnings
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any, Literal

import torch
from torch import nn

from phase4_bitnet.layers import Backward, BitConv1d, BitConv2d, BitEmbedding, BitLinear, TernaryWeight

# Names that the output layer goes by in torch, timm and Hugging Face models, at any depth ...
HEAD_NAMES = ("lm_head", "head", "classifier", "score", "fc_out", "output_projection", "qa_outputs")
# ... and as an attribute of the model itself only; inside a block they are something else.
TOP_HEAD_NAMES = ("output", "out", "fc", "logits", "decoder", "proj_out")
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def convert_model_to_bitnet(
    model: nn.Module,
    *,
    skip: Sequence[str] | None = None,
    weight_bits: float = 1.58,
    quantization_mode: str = "deterministic",
    norm: bool | Literal["auto"] = "auto",
    activation_bits: int | None = 8,
    backward: Backward = "auto",
    convolutions: bool = False,
    embeddings: bool = False,
) -> nn.Module:
    """Replace the hidden linear layers of ``model`` by :class:`BitLinear`, in place.

    The output head, embeddings and norms stay float, as in BitNet b1.58. Weights, biases, devices,
    frozen flags, hooks and weight tying are kept: the latent is the very parameter that the float
    layer had. Layers that are ternary already are left alone. So are layers of a subclass with a
    forward of its own, with a warning that names them.

    Args:
        model: any module.
        skip: names (or shell patterns such as ``"encoder.*.fc1"``) to leave float. None keeps the
            head: layers called like one, those tied to an embedding, else the last linear layer.
        weight_bits, quantization_mode, activation_bits, backward: as for :class:`BitLinear`.
        norm: put an RMSNorm without a gain before each ternary linear. "auto" does so in models with
            attention and not in others. It changes the function that the layer computes.
        convolutions: convert Conv1d and Conv2d too, weights only; without ``skip`` the first one stays
            float.
        embeddings: convert embedding tables too, weights only.

    Returns:
        ``model``, changed.

    Raises:
        ValueError: nothing can be converted, a ``skip`` name matches no layer, or the weight of a layer
            is computed from others (weight_norm, parametrizations) or not there yet (lazy layers).

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [type(m).__name__ for m in convert_model_to_bitnet(net) if list(m.parameters())]
        ['BitLinear', 'BitLinear', 'Linear']
    """
    common: dict[str, Any] = {"weight_bits": weight_bits, "quantization_mode": quantization_mode}
    linear_options = {
        **common,
        "norm": _has_attention(model) if norm == "auto" else norm,
        "activation_bits": activation_bits,
        "backward": backward,
    }
    # Not deduplicated: a module that is reachable by two names is replaced at both.
    places = dict(model.named_modules(remove_duplicate=False))
    kinds: tuple[Any, ...] = (nn.Linear,)
    if convolutions:
        kinds += (nn.Conv1d, nn.Conv2d)
    if embeddings:
        kinds += (nn.Embedding,)
    candidates = {
        n: m for n, m in places.items() if isinstance(m, kinds) and not isinstance(m, TernaryWeight)
    }
    foreign = [n for n, m in candidates.items() if not _computes_as(m, kinds)]
    candidates = {n: m for n, m in candidates.items() if n not in foreign}
    fused = _read_past_forward(places)
    kept = _names_to_skip(model, candidates, skip)
    converted: dict[int, nn.Module] = {}
    chosen = {n: m for n, m in candidates.items() if n not in kept and n not in fused}
    for name, module in chosen.items():
        _check_weight(name, module)
    for name, module in chosen.items():
        if id(module) not in converted:
            options = linear_options if isinstance(module, nn.Linear) else common
            converted[id(module)] = _ternary_twin(module, options)
        parent_name, _, attribute = name.rpartition(".")
        if name == "":
            raise ValueError(
                "the model is itself one linear layer; wrap it in a module, or build a BitLinear"
            )
        setattr(places[parent_name], attribute, converted[id(module)])
    if foreign:
        warnings.warn(
            f"{len(foreign)} layers stay float, {foreign[0]!r} first: they have options or a forward of "
            "their own that a ternary layer would drop",
            stacklevel=2,
        )
    if fused:
        warnings.warn(
            f"{len(fused)} attention projections stay float, {sorted(fused)[0]!r} first: "
            "nn.MultiheadAttention reads their weights directly; build attention from nn.Linear instead",
            stacklevel=2,
        )
    if not converted and not any(isinstance(m, TernaryWeight) for m in model.modules()):
        raise ValueError(
            f"nothing to convert in {type(model).__name__}: of its {len(candidates)} suitable layers all are "
            f"kept in float ({', '.join(sorted(kept)) or 'none'}); pass skip=() to convert the head too"
        )
    _leave_fast_path(places)
    return model


def hidden_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers that are neither the head nor tied to an embedding, ternary or float.

    Example:
        >>> hidden_linears(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        ['0']
    """
    linears: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    floats = {n: m for n, m in linears.items() if not isinstance(m, TernaryWeight)}
    if len(floats) < len(linears):
        # Already ternary somewhere: what is hidden has been decided.
        return [n for n in linears if n not in floats]
    kept = _names_to_skip(model, floats, None)
    return [n for n in linears if n not in kept]


def _computes_as(module: nn.Module, kinds: tuple[Any, ...]) -> bool:
    """Whether the module does what its torch class does and no more, so that a twin can stand in."""
    kind = next(k for k in kinds if isinstance(module, k))
    if isinstance(module, nn.Embedding) and (module.max_norm or module.sparse or module.scale_grad_by_freq):
        return False
    # A lazy layer changes its class at the first forward; it is refused with a message of its own.
    lazy = isinstance(module, nn.modules.lazy.LazyModuleMixin)
    return type(module).forward is kind.forward or lazy


def _check_weight(name: str, module: nn.Module) -> None:
    weight = module._parameters.get("weight")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(
            f"layer {name!r} is lazy and has no weight yet; run one batch through the model first"
        )
    if weight is None:
        raise ValueError(
            f"the weight of layer {name!r} is computed from others (weight_norm or a parametrization); "
            "remove that first, or keep the layer in float by name"
        )


def _has_attention(model: nn.Module) -> bool:
    return any("attention" in type(m).__name__.lower() for m in model.modules())


def _read_past_forward(places: dict[str, nn.Module]) -> set[str]:
    """Names of linears whose weight the parent reads itself, so that a replacement would be ignored."""
    return {
        f"{name}.{child}" if name else child
        for name, module in places.items()
        if isinstance(module, nn.MultiheadAttention)
        for child, m in module.named_children()
        if isinstance(m, nn.Linear)
    }


def _leave_fast_path(places: dict[str, nn.Module]) -> None:
    """Keep torch's fused encoder kernel, which reads latents directly, away from ternary layers."""
    for module in places.values():
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(m, TernaryWeight) for m in module.modules()
        ):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _names_to_skip(
    model: nn.Module, candidates: dict[str, nn.Module], skip: Sequence[str] | None
) -> set[str]:
    if skip is not None:
        kept = {n for n in candidates for pattern in skip if n == pattern or fnmatch(n, pattern)}
        for pattern in skip:
            if not any(n == pattern or fnmatch(n, pattern) for n in candidates):
                raise ValueError(
                    f"skip={pattern!r} matches no convertible layer; the model has: "
                    f"{', '.join(sorted(candidates))}"
                )
        return kept
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linears = [n for n, m in candidates.items() if isinstance(m, nn.Linear)]
    heads = {
        n
        for n in linears
        if n.rsplit(".", 1)[-1] in HEAD_NAMES or n in TOP_HEAD_NAMES or id(candidates[n].weight) in tied
    }
    if not heads and linears:
        heads = {linears[-1]}
    convolutions = [n for n, m in candidates.items() if isinstance(m, (nn.Conv1d, nn.Conv2d))]
    return heads | set(convolutions[:1])


def _ternary_twin(module: nn.Module, options: dict[str, Any]) -> nn.Module:
    """A ternary layer that owns the float layer's own parameters, hooks and mode."""
    twin: Any
    if isinstance(module, nn.Linear):
        twin = BitLinear(
            module.in_features, module.out_features, module.bias is not None, device="meta", **options
        )
    elif isinstance(module, (nn.Conv1d, nn.Conv2d)):
        kind: Any = BitConv1d if isinstance(module, nn.Conv1d) else BitConv2d
        twin = kind(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            bias=module.bias is not None,
            padding_mode=module.padding_mode,
            device="meta",
            **options,
        )
    elif isinstance(module, nn.Embedding):
        twin = BitEmbedding(
            module.num_embeddings, module.embedding_dim, module.padding_idx, device="meta", **options
        )
    else:
        raise TypeError(f"no ternary form of {type(module).__name__}")
    twin.weight = module.weight
    if getattr(module, "bias", None) is not None:
        twin.bias = module.bias
    device = module.weight.device if isinstance(module.weight, torch.Tensor) else None
    twin.codes = torch.empty(twin.weight.shape, dtype=torch.int8, device=device)
    twin.scale = torch.empty((), dtype=torch.float32, device=device)
    if not twin.weight.is_meta:
        twin.requantize_()
    for hooks in _HOOKS:
        setattr(twin, hooks, getattr(module, hooks))
    return twin.train(module.training)
