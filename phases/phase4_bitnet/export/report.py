"""What an exporter says about the file it wrote, and how it holds it against the model."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phase4_bitnet.store import unwrap

# Tokens that a decoder is held to when the caller gives no sample.
SAMPLE_ROWS, SAMPLE_LENGTH = 2, 32


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """One exported model.

    Args:
        format: "huggingface", "gguf", "onnx" or "torch".
        path: the file or folder.
        bytes: what it takes on disk.
        float_bytes: what the model's parameters take in float32.
        checked_with: the software that loaded the file and ran it, with version; None where it is not
            installed, so that nothing was compared.
        largest_difference: between its outputs and the model's, over the sample.
        usual_difference: the median over rows (positions) of the largest difference in a row. It is far
            smaller where files round activations as the model does: only a value that lies between two int8
                steps may
            fall to the other, and changes what follows.
        largest_output: magnitude, to hold the former against.
        notes: what else there is to know, a sentence each.
    """

    format: str
    path: Path
    bytes: int
    float_bytes: int
    checked_with: str | None
    largest_difference: float | None
    usual_difference: float | None
    largest_output: float | None
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report as lines of text."""
        lines = [f"{self.path}: {self.bytes / 1e6:.3f} MB; {self.float_bytes / 1e6:.3f} MB in float32"]
        if self.checked_with is None:
            lines.append("not checked: the library that reads this format is not installed")
        elif self.largest_difference is None:
            lines.append(f"checked with {self.checked_with}: codes and scales are the model's")
        else:
            lines.append(
                f"checked with {self.checked_with}: outputs differ from the model's by at most "
                f"{self.largest_difference:.2g}, at half of the places by at most "
                f"{self.usual_difference:.2g}; the largest output is {self.largest_output:.3g}"
            )
        return [*lines, *self.notes]


def make_report(
    format: str,
    path: Path,
    model: nn.Module,
    checked_with: str | None,
    outputs: tuple[Tensor, Tensor] | None,
    notes: tuple[str, ...] = (),
) -> ExportReport:
    """Put a report together.

    Args:
        format, path, checked_with, notes: as for :class:`ExportReport`.
        model: what was exported.
        outputs: the model's and the file's, of one shape, where both were computed.
    """
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    largest = usual = magnitude = None
    if outputs is not None:
        ours, theirs = (o.float() for o in outputs)
        rows = (ours - theirs).abs().flatten(0, -2).amax(-1)
        largest, usual, magnitude = float(rows.max()), float(rows.median()), float(ours.abs().max())
    return ExportReport(
        format=format,
        path=path,
        bytes=sum(p.stat().st_size for p in files),
        float_bytes=4 * sum(p.numel() for p in model.parameters()),
        checked_with=checked_with,
        largest_difference=largest,
        usual_difference=usual,
        largest_output=magnitude,
        notes=notes,
    )


def optional(module: str) -> Any | None:
    """A library that checks a file, or None where it is not installed."""
    return importlib.import_module(module) if importlib.util.find_spec(module) else None


def required(module: str, extra: str, format: str) -> Any:
    """A library without which a format cannot be written.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"the format {format} needs {module}, which is not installed; "
            f"run pip install 'forge-training[{extra}]'"
        ) from error


def version_of(distribution: str) -> str:
    """Name and version of an installed distribution."""
    return f"{distribution} {metadata.version(distribution)}"


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


@contextmanager
def new_file(path: Path, overwrite: bool) -> Iterator[Path]:
    """A place to write a file that takes its name once all went well.

    Raises:
        FileExistsError: there is one and `overwrite` is False.
    """
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True, or another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
