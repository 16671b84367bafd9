"""Options of the reference architectures: frozen, checked when made, and plain JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar


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


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
        raise ValueError(f"{name}={value!r} is not supported; use {' or '.join(map(repr, allowed))}")


def _count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} is not a positive integer; use {name}=1 or more")


def _positive(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} is not a positive number; use a finite {name} above 0")
