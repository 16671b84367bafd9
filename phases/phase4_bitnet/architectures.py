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
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase4_bitnet.attention import rope_table
from phase4_bitnet.decoder_blocks import Block, hidden_linear
from phase4_bitnet.layers import ternary_layers
from phase4_bitnet.rms_norm import RMSNorm


@dataclass(frozen=True, kw_only=True)
class TernaryConfig:
    """Options shared by every architecture: how its hidden linear layers are quantized.

    Args:
        ternary: BitLinear hidden layers; False gives the float twin.
        weight_bits: 1.58 for codes {-1, 0, 1}, 1 for {-1, 1}.
        quantization_mode: "deterministic" or "stochastic" rounding.
        activation_bits: 8, or None for float activations.
        backward: arithmetic of BitLinear's gradient products: "auto", "float32", "bf16" or "int8".
        norm_eps: added to the mean square in every RMSNorm.

    Raises:
        ValueError: an option is outside its range.
    """

    architecture: ClassVar[str] = ""

    ternary: bool = True
    weight_bits: float = 1.58
    quantization_mode: str = "deterministic"
    activation_bits: int | None = 8
    backward: str = "auto"
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _one_of("ternary", self.ternary, (True, False))
        _one_of("weight_bits", self.weight_bits, (1.58, 1))
        _one_of("quantization_mode", self.quantization_mode, ("deterministic", "stochastic"))
        _one_of("activation_bits", self.activation_bits, (8, None))
        _one_of("backward", self.backward, ("auto", "float32", "bf16", "int8"))
        _positive("norm_eps", self.norm_eps)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON types, with its name under "architecture"."""
        fields = dataclasses.asdict(self)
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
        return {"architecture": self.architecture, **plain}


@dataclass(frozen=True, kw_only=True)
class MLPConfig(TernaryConfig):
    """Options of the multilayer perceptron, besides those of `TernaryConfig`.

    Args:
        in_features: features of one sample; inputs of more dimensions are flattened.
        hidden: widths of the hidden layers, at least one.
        num_outputs: width of the float head: classes, or values to regress.
        norm: RMSNorm with a learned gain after each activation, so each layer but the first reads
            normalized input.
    """

    architecture: ClassVar[str] = "mlp"

    in_features: int
    hidden: tuple[int, ...] = (256, 256)
    num_outputs: int
    norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.hidden, str) or not isinstance(self.hidden, Iterable):
            raise ValueError(
                f"hidden={self.hidden!r} is not a list of widths; use for example hidden=(256, 256)"
            )
        object.__setattr__(self, "hidden", tuple(self.hidden))  # JSON gives a list
        _count("in_features", self.in_features)
        _count("num_outputs", self.num_outputs)
        _one_of("norm", self.norm, (True, False))
        if not self.hidden:
            raise ValueError("hidden=() has no layer to make ternary; use for example hidden=(256, 256)")
        for i, width in enumerate(self.hidden):
            _count(f"hidden[{i}]", width)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(TernaryConfig):
    """Options of the decoder transformer, besides those of `TernaryConfig`.

    Without `num_classes` and `num_outputs` the model predicts the next token at every position. With one
    of them the head reads the last position that is not padding and gives one row a sample.

    Args:
        vocab_size: number of token ids.
        dim: width of the residual stream.
        layers: number of blocks.
        heads: attention heads; must divide `dim` into heads of an even width.
        mlp_ratio: hidden width of the MLP over `dim`.
        max_length: longest input in tokens.
        num_classes: width of the classification head, or None.
        num_outputs: width of the regression head, or None.
        pad_id: the padding id for right-padded input, or None when every input is full.
        rope_base: base of the rotary frequencies.
        tie_embeddings: next-token head shares the embedding table.
    """

    architecture: ClassVar[str] = "decoder"
    # Llama's blocks in the place of BitNet's; see `decoder_blocks`.
    gated: ClassVar[bool] = False

    vocab_size: int
    dim: int = 128
    layers: int = 2
    heads: int = 4
    mlp_ratio: float = 4.0
    max_length: int = 256
    num_classes: int | None = None
    num_outputs: int | None = None
    pad_id: int | None = None
    rope_base: float = 10000.0
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vocab_size", "dim", "layers", "heads", "max_length"):
            _count(name, getattr(self, name))
        for name in ("num_classes", "num_outputs"):
            if getattr(self, name) is not None:
                _count(name, getattr(self, name))
        _positive("mlp_ratio", self.mlp_ratio)
        _positive("rope_base", self.rope_base)
        _one_of("tie_embeddings", self.tie_embeddings, (True, False))
        if self.dim % self.heads or self.dim // self.heads % 2:
            fits = [h for h in range(1, self.dim // 2 + 1) if self.dim % (2 * h) == 0]
            remedy = (
                f"use heads={min(fits, key=lambda h: abs(h - self.heads))}"
                if fits
                else f"use an even dim, for example dim={2 * self.heads}"
            )
            raise ValueError(
                f"heads={self.heads} does not divide dim={self.dim} into heads of even width; {remedy}"
            )
        if self.mlp_width < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} of dim={self.dim} leaves no hidden unit; raise it")
        if self.num_classes is not None and self.num_outputs is not None:
            raise ValueError("num_classes and num_outputs are both set; keep one, the model has one head")
        if self.tie_embeddings and self.pooled:
            raise ValueError(
                "tie_embeddings=True needs the next-token head; drop num_classes and num_outputs"
            )
        if self.pad_id is not None:
            if not isinstance(self.pad_id, int) or isinstance(self.pad_id, bool):
                raise ValueError(f"pad_id={self.pad_id!r} is not a token id; use an integer or None")
            if not 0 <= self.pad_id < self.vocab_size:
                raise ValueError(f"pad_id={self.pad_id} is outside the vocabulary 0..{self.vocab_size - 1}")

    @property
    def pooled(self) -> bool:
        """True when the head reads one position a sample."""
        return self.num_classes is not None or self.num_outputs is not None

    @property
    def mlp_width(self) -> int:
        """Hidden units of each MLP."""
        return int(self.dim * self.mlp_ratio)

    @property
    def head_width(self) -> int:
        """Outputs of the head."""
        return self.num_classes or self.num_outputs or self.vocab_size


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """Options of the Llama decoder: those of `DecoderConfig`, with a narrower MLP, which has a gate.

    For GGUF's ternary types `dim` and `dim * mlp_ratio` have to be multiples of 256.
    """

    architecture: ClassVar[str] = "llama"
    gated: ClassVar[bool] = True

    mlp_ratio: float = 3.0


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


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
        raise ValueError(f"{name}={value!r} is not supported; use {' or '.join(map(repr, allowed))}")


def _count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} is not a positive integer; use {name}=1 or more")


def _positive(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} is not a positive number; use a finite {name} above 0")
