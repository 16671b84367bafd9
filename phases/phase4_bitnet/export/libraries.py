"""The libraries of other tools: those that write a format, and those that check it."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from typing import Any


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
