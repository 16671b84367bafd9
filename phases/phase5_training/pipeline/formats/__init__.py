"""One reader a format, and the one place that chooses among them.

`open_source` turns a path, a list of paths, a folder or a glob into a `Source`.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from phase5_training.errors import DataError
from phase5_training.pipeline.formats.arrow import open_arrow, open_csv, open_parquet
from phase5_training.pipeline.formats.binary import open_npy, open_npz, open_safetensors, open_tokens
from phase5_training.pipeline.formats.compressed import COMPRESSIONS, open_compressed
from phase5_training.pipeline.formats.hdf5 import open_hdf5
from phase5_training.pipeline.formats.json import open_json, open_json_lines
from phase5_training.pipeline.formats.pickle import open_pickle
from phase5_training.pipeline.formats.source import ArraySource, ReadOptions, ShardedSource, Source
from phase5_training.pipeline.formats.text import TokenBlocks, open_text

Opener = Callable[[Path, ReadOptions], Source]

READERS: dict[str, Opener] = {
    ".json": open_json,
    ".jsonl": open_json_lines,
    ".ndjson": open_json_lines,
    ".h5": open_hdf5,
    ".hdf5": open_hdf5,
    ".pkl": open_pickle,
    ".pickle": open_pickle,
    ".pt": open_pickle,
    ".pth": open_pickle,
    ".npy": open_npy,
    ".npz": open_npz,
    ".safetensors": open_safetensors,
    ".parquet": open_parquet,
    ".arrow": open_arrow,
    ".feather": open_arrow,
    ".csv": open_csv,
    ".tsv": open_csv,
    **{text + last: open_compressed for text in (".json", ".jsonl", ".ndjson") for last in COMPRESSIONS},
}
# Formats whose files join into one stream of tokens.
STREAM_READERS: dict[str, Callable[[list[Path], ReadOptions], Source]] = {
    ".bin": open_tokens,
    ".txt": open_text,
}
EXTENSIONS = (*READERS, *STREAM_READERS)


def open_source(where: str | Path | Sequence[str | Path], options: ReadOptions | None = None) -> Source:
    """Open data files.

    Args:
        where: a file, a list of files, a folder (read with its subfolders, in name order) or a glob
            pattern. Several files must be of one format. Folders and patterns give no file that is a link
            to somewhere outside of them; one that is named by itself may be.
        options: how to read; the defaults load what fits in memory.

    Raises:
        DataError: nothing there, an unknown extension, mixed formats, or what the reader finds.
    """
    options, files = options or ReadOptions(), data_files(where)
    kinds = {_reader(file) for file in files}
    if len(kinds) > 1:
        names = sorted({extension(file) for file in files})
        raise DataError(f"{files[0].parent}: files of different formats {names}; use one format at a time")
    suffix = extension(files[0])
    if suffix in STREAM_READERS:
        return _sparing(STREAM_READERS[suffix](files, options), options)
    # What fits in memory is judged by all files together.
    total = max(sum(file.stat().st_size for file in files), 1)
    shares = [options.memory_limit * file.stat().st_size // total for file in files]
    sources = [
        _sparing(READERS[suffix](file, replace(options, memory_limit=share)), options)
        for file, share in zip(files, shares, strict=True)
    ]
    return sources[0] if len(sources) == 1 else ShardedSource(sources)


def data_files(where: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that `open_source` reads, in their order."""
    items: list[Any] = list(where) if isinstance(where, (list, tuple)) else [where]
    files = [file for item in items for file in _files(Path(item))]
    if not files:
        raise DataError("the list of data files is empty; name at least one file")
    return files


def _sparing(source: Source, options: ReadOptions) -> Source:
    if options.streaming and isinstance(source, (ArraySource, TokenBlocks)):
        source.spare_memory()
    return source


def extension(file: Path) -> str:
    """What a file's name ends with, in small letters; of a compressed one both parts.

    Example:
        >>> extension(Path("a.JSON")), extension(Path("b.v2.jsonl.gz"))
        ('.json', '.jsonl.gz')
    """
    last = file.suffix.lower()
    return Path(file.stem).suffix.lower() + last if last in COMPRESSIONS else last


def _reader(file: Path) -> Callable:
    suffix = extension(file)
    if suffix in READERS:
        return READERS[suffix]
    if suffix in STREAM_READERS:
        return STREAM_READERS[suffix]
    near = difflib.get_close_matches(suffix, EXTENSIONS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise DataError(
        f"{file}: unknown extension {suffix or '(none)'!r}; {hint}known are {', '.join(EXTENSIONS)}"
    )


def _files(path: Path) -> list[Path]:
    """The data files a path stands for."""
    if path.is_file():
        return [path]
    if path.is_dir():
        return _folder(path)
    if glob.has_magic(str(path)):
        root, found = _matches(path)
        if found:
            return [_within(root, file) for file in found if not _beside(file)]
        raise DataError(f"{path}: no file matches this pattern")
    folder = path.parent
    if not folder.is_dir():
        raise DataError(f"{path}: no such file; the folder {folder} does not exist either")
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    else:
        hint = f"the folder holds {', '.join(names[:5]) or 'nothing'}{' ...' if len(names) > 5 else ''}"
    raise DataError(f"{path}: no such file; {hint}")


def _matches(pattern: Path) -> tuple[Path, list[Path]]:
    """The folder that a pattern begins in, and the files in it that match, in name order."""
    first = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
    root = Path(*pattern.parts[:first])
    hidden = pattern.name.startswith(".")  # as in a shell; an index that is kept beside a file is hidden
    # Path.glob enters no link to a folder for **, which may lead in circles.
    found = root.glob(str(Path(*pattern.parts[first:])))
    return root, sorted(p for p in found if p.is_file() and (hidden or not p.name.startswith(".")))


def _within(root: Path, file: Path) -> Path:
    """A file that was found and not named: it has to lie where it was looked for."""
    if not file.resolve().is_relative_to(root.resolve()):
        raise DataError(
            f"{file}: a link that leads out of the data folder {root}; copy the file in, or name it by itself"
        )
    return file


def _folder(folder: Path) -> list[Path]:
    files = []
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if hidden or not file.is_file() or extension(file) not in EXTENSIONS or _beside(file):
            continue
        files.append(_within(folder, file))
    if not files:
        raise DataError(f"{folder}: holds no data file; known extensions are {', '.join(EXTENSIONS)}")
    return files


def _beside(file: Path) -> bool:
    """Whether a file belongs to another one: the sidecar of a .bin, the targets of a .npy."""
    if file.suffix == ".json":
        return file.with_suffix("").suffix == ".bin" or file.with_suffix(".bin").is_file()
    for part in ("_targets", "_quality"):
        if file.suffix == ".npy" and file.stem.endswith(part):
            return file.with_name(file.stem.removesuffix(part) + ".npy").is_file()
    return False
