"""What an exporter says about the file it wrote, and the file itself until it is whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn


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
            steps may fall to the other, and changes what follows.
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
