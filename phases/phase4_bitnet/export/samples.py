"""Inputs on which an exported file is held against the model, and the model's outputs on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from phase4_bitnet.store import unwrap

# Tokens that a decoder is held to when the caller gives no sample.
SAMPLE_ROWS, SAMPLE_LENGTH = 2, 32


def longest_input(model: nn.Module) -> int | None:
    """Most tokens a model takes, where its configuration says so."""
    config = getattr(unwrap(model), "config", None)
    return getattr(config, "max_length", None) or getattr(config, "max_position_embeddings", None)


def sample_for(model: nn.Module) -> Tensor:
    """An input for a reference architecture: random tokens or features, always the same.

    Raises:
        ValueError: the model is another, whose input cannot be guessed.
    """
    config = getattr(unwrap(model), "config", None)
    generator = torch.Generator().manual_seed(0)
    features = getattr(config, "in_features", None)
    if features:
        return torch.randn(SAMPLE_ROWS, features, generator=generator)
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary:
        length = min(longest_input(model) or SAMPLE_LENGTH, SAMPLE_LENGTH)
        return torch.randint(vocabulary, (SAMPLE_ROWS, length), generator=generator)
    raise ValueError(
        f"what a {type(unwrap(model)).__name__} takes is not known; pass sample=, an input of two rows or "
        "more"
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients; each module's mode is put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def outputs_of(model: nn.Module, sample: Tensor) -> Tensor:
    """What the model gives for a sample: its tensor, or its logits, on the CPU.

    Raises:
        ValueError: it returns neither.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with evaluating(model):
        out = model(sample.to(device))
    out = getattr(out, "logits", out)
    if not isinstance(out, Tensor):
        raise ValueError(
            f"{type(model).__name__} returns a {type(out).__name__}; only a model that returns one "
            "tensor, or .logits, can be exported"
        )
    return out.detach().cpu()
