"""Reference models that are rebuilt from a plain configuration, without running anybody's code.

A registry maps a name to (frozen configuration, module class). `model.config.to_dict()` is plain JSON and
`build_model_from_dict` turns it back into the model, so a saved session needs no pickle.

    mlp      hidden linear layers with ReLU and RMSNorm, float head
    decoder  a causal transformer: next-token, classification or regression
    llama    the same with Llama's blocks, which llama.cpp and transformers compute exactly

Only the hidden linear layers are ternary; embeddings, norms and the head stay float, as in BitNet b1.58
(Ma et al. 2024, arXiv:2402.17764). With `ternary=False` the same layers are `nn.Linear`: same names, same
norms, same parameters, same initial values under the same seed, so float is a fair baseline.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase4_bitnet.architecture_config import DecoderConfig, LlamaConfig, MLPConfig, TernaryConfig
from phase4_bitnet.attention import rope_table
from phase4_bitnet.decoder_blocks import Block, hidden_linear
from phase4_bitnet.layers import ternary_layers
from phase4_bitnet.rms_norm import RMSNorm


class MLP(nn.Module):
    """Linear, ReLU, RMSNorm for each hidden width, then a float head.

    Initial weights: normal with variance 2 / fan_in, zero biases (He et al. 2015, arXiv:1502.01852); the
    head 1 / fan_in, since no ReLU follows it.

    Args:
        config: the options.

    Shape:
        input (batch, in_features) or (batch, ...) of that many values; output (batch, num_outputs).

    >>> build_model("mlp", in_features=4, hidden=(8,), num_outputs=3)(torch.ones(2, 4)).shape
    torch.Size([2, 3])
    """

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.in_features, *config.hidden]
        self.hidden = nn.ModuleList(
            hidden_linear(config, a, b, bias=True) for a, b in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(
            RMSNorm(width, eps=config.norm_eps) if config.norm else nn.Identity() for width in config.hidden
        )
        self.head = nn.Linear(widths[-1], config.num_outputs)
        with torch.no_grad():
            for linear, gain in [*((m, 2.0) for m in self.hidden), (self.head, 1.0)]:
                linear = cast(nn.Linear, linear)
                linear.weight.normal_(std=math.sqrt(gain / linear.in_features))
                linear.bias.zero_()
        _refresh_codes(self)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the network to `x` (batch, ...)."""
        x = x.flatten(1)
        if x.shape[1] != self.config.in_features:
            raise ValueError(
                f"input has {x.shape[1]} features a sample, the model in_features={self.config.in_features}; "
                f"build it with in_features={x.shape[1]}"
            )
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            x = norm(F.relu(linear(x)))
        return self.head(x)


class Decoder(nn.Module):
    """A causal transformer: RMSNorm, RoPE, squared-ReLU MLP, no biases.

    Initial weights are GPT-2's: normal with std 0.02, and 0.02 / sqrt(2 * layers) for the two
    projections of each block that write to the residual stream (Radford et al. 2019, section 2.3;
    karpathy/nanoGPT model.py).

    Args:
        config: the options.

    Shape:
        input (batch, length) integer token ids, right-padded with `pad_id`; output (batch, length,
        vocab_size) for next-token, else (batch, num_classes or num_outputs).

    >>> build_model("decoder", vocab_size=99, num_classes=97)(torch.zeros(2, 4, dtype=torch.long)).shape
    torch.Size([2, 97])
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, config.head_width, bias=False)
        cos, sin = rope_table(config.max_length, config.dim // config.heads, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() == 2:
                    residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                    parameter.normal_(std=0.02 / math.sqrt(2 * config.layers) if residual else 0.02)
        if config.tie_embeddings:
            self.head.weight = self.embed_tokens.weight
        _refresh_codes(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """Apply the model to `tokens` (batch, length)."""
        if tokens.dim() != 2:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}, wanted (batch, length); add the missing axis"
            )
        length = tokens.shape[1]
        if length > self.config.max_length:
            raise ValueError(
                f"input has {length} tokens, the model max_length={self.config.max_length}; shorten the "
                f"input or build the model with max_length={length}"
            )
        x = self.embed_tokens(tokens)
        # A model cast to bf16 casts its buffers too; apply_rope goes on in float32 either way.
        cos, sin = self.cos[:length].float(), self.sin[:length].float()
        for layer in self.layers:
            x = layer(x, cos, sin)
        if self.config.pooled:
            # Causal attention: no position before the padding sees it, so picking one is all it takes.
            x = x[torch.arange(x.shape[0], device=x.device), self._last_position(tokens)]
        return self.head(self.norm(x))

    def _last_position(self, tokens: Tensor) -> Tensor:
        """(batch,) index of the last token that is not padding; the last one where all are."""
        last = tokens.new_full((tokens.shape[0],), tokens.shape[1] - 1)
        if self.config.pad_id is None:
            return last
        return last - (tokens != self.config.pad_id).flip(1).int().argmax(dim=1)


class Llama(Decoder):
    """A causal transformer with the blocks of Llama (Touvron et al. 2023, arXiv:2302.13971).

    RMSNorm, RoPE and SwiGLU, no biases and no norm inside a block but the two in front: the function of
    Hugging Face's LlamaForCausalLM and of llama.cpp's "llama", so that an exported model is the trained one.

    Args:
        config: the options.

    Shape:
        as for `Decoder`.

    >>> build_model("llama", vocab_size=256, dim=64)(torch.zeros(2, 4, dtype=torch.long)).shape
    torch.Size([2, 4, 256])
    """


REGISTRY: dict[str, tuple[type[TernaryConfig], type[nn.Module]]] = {
    "mlp": (MLPConfig, MLP),
    "decoder": (DecoderConfig, Decoder),
    "llama": (LlamaConfig, Llama),
}


def build_model(name: str, **options: Any) -> nn.Module:
    """Build a reference model.

    Args:
        name: "mlp", "decoder" or "llama".
        options: fields of `MLPConfig`, `DecoderConfig` or `LlamaConfig`.

    Returns:
        The model on CPU in float32, its configuration under `.config`, weights drawn from torch's
        global generator.

    Raises:
        ValueError: unknown name or option (with the nearest match), missing option, or a bad value.

    >>> build_model("mlp", in_features=64, num_outputs=10).config.hidden
    (256, 256)
    """
    if name not in REGISTRY:
        raise ValueError(f"architecture {name!r} is unknown; {_nearest(name, REGISTRY)}")
    config_class, model_class = REGISTRY[name]
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for option in options:
        if option not in fields:
            raise ValueError(f"{name} has no option {option!r}; {_nearest(option, fields)}")
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in options]
    if missing:
        raise ValueError(f"{name} needs {' and '.join(missing)}; pass {missing[0]}=...")
    return model_class(config_class(**options))


def build_model_from_dict(config: Mapping[str, Any]) -> nn.Module:
    """Build a reference model from what `config.to_dict()` or JSON gave.

    Args:
        config: "architecture" and the options of that architecture.

    Returns:
        The model, freshly initialized.

    Raises:
        ValueError: no "architecture", or as for `build_model`.

    >>> build_model_from_dict({"architecture": "mlp", "in_features": 4, "num_outputs": 2}).config.num_outputs
    2
    """
    if "architecture" not in config:
        raise ValueError(
            f"the model configuration has no 'architecture'; add one of {', '.join(map(repr, REGISTRY))}"
        )
    return build_model(config["architecture"], **{k: v for k, v in config.items() if k != "architecture"})


def _refresh_codes(model: nn.Module) -> None:
    """The weights were drawn after the layers were made, so their codes are those of other weights."""
    for _, layer in ternary_layers(model):
        layer.requantize_()


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(names)}"
