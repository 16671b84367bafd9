"""Folders that appear whole or not at all, whenever the process is killed or the power fails.

A folder is written beside its place under a temporary name, each of its files synced to the disk, then
renamed, and the rename synced. What a killed process leaves behind tells by its name what it is:

    .NAME.PID.new.tmp       was being written: worthless
    .NAME.PID.old.tmp       stepped aside for its replacement: given its name back if that is free
    .NAME.PID.gone.tmp      was being removed: worthless
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

_LEFT = re.compile(r"\.(?P<name>.+)\.\d+\.(?P<kind>new|old|gone)\.tmp", re.DOTALL)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Make or replace a folder; it holds what it held before, or all of the new, never a part.

    Args:
        folder: its place; parents are made.
        write: called with the temporary folder; makes its files with :func:`write_file`.

    Raises:
        OSError: the disk is full, failing or not writable; what was there before stays.
    """
    new = begin_folder(folder)
    try:
        write(new)
        finish_folder(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def begin_folder(folder: Path) -> Path:
    """The temporary folder in which the files of ``folder`` are to be written; see :func:`write_folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent, folder.name)
    new = _temporary(folder, "new")
    new.mkdir()
    return new


def finish_folder(new: Path, folder: Path) -> None:
    """Give what :func:`begin_folder` made, now that its files are written, its place."""
    old = _temporary(folder, "old")
    _sync_folder(new)
    _take_place(new, folder, old)
    _sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, int | str]:
    """Write a file through to the disk.

    Args:
        path: the file.
        parts: its content in pieces, which are not joined in memory; memoryviews are of bytes.

    Returns:
        {"bytes": size, "sha256": hash}, of what was in memory, so that reading the file back tells
        whether the disk holds it.
    """
    digest, size = hashlib.sha256(), 0
    # Unbuffered: an error belongs to the write that met it, and no byte waits for the close.
    with open(path, "wb", buffering=0) as file:
        for part in parts:
            digest.update(part)
            size += len(part)
            rest = memoryview(part)
            while rest:
                rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            # Forget the pages in memory: who reads the file back shall read the disk.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return {"bytes": size, "sha256": digest.hexdigest()}


def remove_folder(folder: Path) -> None:
    """Remove a folder by one rename and then its files, so that no part of it keeps its name."""
    gone = _temporary(folder, "gone")
    os.rename(folder, gone)
    shutil.rmtree(gone)


def recover(parent: Path, name: str | None = None) -> None:
    """Give folders back that stepped aside for a replacement which never came.

    Args:
        parent: where they are.
        name: of the folder; None for all in ``parent``.
    """
    for entry, wanted, kind in _left(parent, name):
        if kind == "old" and not (parent / wanted).exists():
            os.rename(entry, parent / wanted)


def sweep(parent: Path, name: str | None = None) -> None:
    """Recover what can be, and remove what else killed processes left behind.

    Args:
        parent: where they worked.
        name: of the folder they wrote; None for all in ``parent``.
    """
    recover(parent, name)
    for entry, _, _ in _left(parent, name):
        shutil.rmtree(entry, ignore_errors=True)


def _left(parent: Path, name: str | None) -> Iterator[tuple[Path, str, str]]:
    if not parent.is_dir():
        return
    for entry in sorted(parent.iterdir()):
        match = _LEFT.fullmatch(entry.name)
        if match and name in (None, match["name"]) and entry.is_dir() and not entry.is_symlink():
            yield entry, match["name"], match["kind"]


def _take_place(new: Path, folder: Path, old: Path) -> None:
    # No call swaps two folders everywhere; between the two renames the old one is aside.
    try:
        if folder.exists():
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            if old.exists() or not folder.exists():
                raise
            # A reader took the old one for left behind, and gave it its name back.
            os.rename(folder, old)
            os.rename(new, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise


def _temporary(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{os.getpid()}.{kind}.tmp")


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened, and needs not be
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
