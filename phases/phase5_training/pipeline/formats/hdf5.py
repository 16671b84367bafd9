"""HDF5: /dataset/inputs, /dataset/targets (an array or a group of named ones), /dataset/quality.

The two arrays may also lie at the top level. The file is opened by each process when it first reads:
an HDF5 handle must not cross a fork. Everything that makes HDF5 read another file or run code from
one (external links and storage, virtual data sets, plug-in filters) is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from phase5_training.errors import DataError
from phase5_training.pipeline.formats.columns import Columns, Targets, Values
from phase5_training.pipeline.formats.hdf5_chunks import check_chunks, check_filters, damage_told
from phase5_training.pipeline.formats.limits import INFLATED_FLOOR, check_width
from phase5_training.pipeline.formats.objects import QUALITY_KEYS, source_from_arrays
from phase5_training.pipeline.formats.record_columns import INPUT_KEYS, TARGET_KEYS, choose_key
from phase5_training.pipeline.formats.source import CHUNK_BYTES, Access, ReadOptions, Source

_MAX_LINKS = 8
BLOCK_BYTES = 1 << 20  # read at a time where the file has no chunks
# Bytes of text for each byte of the file: rows may share one text, and no common writer does so.
TEXT_SHARE = 16
MAX_SHOWN = 200  # characters of an attribute


def open_hdf5(path: Path, options: ReadOptions) -> Source:
    """An HDF5 file as a source: loaded when it fits, read in place when not.

    Raises:
        DataError: not HDF5, inputs missing, rows that do not match, or a feature that is refused.
    """
    source = Hdf5Source(path, options.inputs_path, options.targets_path)
    if not options.loads(source.nbytes):
        return source
    arrays = {name: source.read_all(name) for name in source.names}
    details = {k: v for k, v in source.describe().items() if k in ("attributes", "metadata")}
    return source_from_arrays(arrays, "hdf5", str(path), details=details)


class Hdf5Source:
    """Reads records of an HDF5 file in place.

    ``names`` maps column names (inputs, targets, targets.NAME, quality) to paths in the file.
    """

    format = "hdf5"
    access: Access = "mapped"
    vocab_size: int | None = None

    def __init__(self, path: Path, inputs: str | None = None, targets: str | None = None) -> None:
        self.path, self.paths = path, [str(path)]
        self._file: h5py.File | None = None
        self._pid = -1
        self._handles: dict[str, h5py.Dataset] = {}
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            reason = str(error).split("(")[0].strip()
            raise DataError(f"{path}: cannot be opened as HDF5 ({reason})") from error
        with damage_told(path), file:
            self.names, group = self._chosen(file, inputs, targets)
            rows = {name: self._check(file, name, where) for name, where in self.names.items()}
            self._length = rows["inputs"]
            for name, n in rows.items():
                if n != self._length:
                    raise DataError(
                        f"{path}: inputs has {self._length} rows and {name} has {n}; wanted as many"
                    )
            if not self._length:
                raise DataError(f"{path}: {self.names['inputs']} is empty; wanted at least one record")
            self._stored = path.stat().st_size
            self.nbytes = sum(self._size(file[where]) for where in self.names.values())
            data = file[self.names["inputs"]]
            self._row_bytes = max(1, self._size(data) // self._length)
            self._block_rows = data.chunks[0] if data.chunks else max(1, BLOCK_BYTES // self._row_bytes)
            self._attributes = _shown(group.attrs)
            metadata = group.get("metadata")
            self._metadata = _shown(metadata.attrs) if metadata is not None else {}

    def _size(self, data: h5py.Dataset) -> int:
        """Bytes of a data set; texts of any length lie elsewhere in the file, and fill it at most."""
        return self._stored if _is_text(data) else data.nbytes

    def _refuse_links(self, group: h5py.Group, where: str) -> None:
        """Refuse a path that leaves the file at any step, through any chain of soft links."""
        for _ in range(_MAX_LINKS):
            node, parts = group, [part for part in where.split("/") if part]
            for i, part in enumerate(parts):
                link = node.get(part, getlink=True)
                if isinstance(link, h5py.ExternalLink):
                    raise DataError(
                        f"{self.path}: {part!r} is an external link to {link.filename!r}; "
                        "data files may not read other files: copy the data in"
                    )
                if isinstance(link, h5py.SoftLink):
                    rest = "/".join(parts[i + 1 :])
                    base = "" if link.path.startswith("/") else node.name.rstrip("/") + "/"
                    group, where = group.file["/"], f"{base}{link.path}/{rest}"
                    break
                node = node[part]
            else:
                return
        raise DataError(f"{self.path}: {where!r} is a chain of more than {_MAX_LINKS} soft links")

    def _chosen(
        self, file: h5py.File, inputs: str | None, targets: str | None
    ) -> tuple[dict[str, str], h5py.Group]:
        """Column names -> paths in the file, and the group that holds them; named by the user, or found."""
        names, group = (dict[str, str](), file) if inputs else self._find(file)
        if targets:
            names = {name: where for name, where in names.items() if not name.startswith("targets")}
        for column, where in (("inputs", inputs), ("targets", targets)):
            if where is None:
                continue
            self._refuse_missing(file, where)
            found = file[where]
            if column == "targets" and isinstance(found, h5py.Group):
                for name in sorted(found):
                    self._refuse_links(file, f"{found.name}/{name}")
                    names[f"targets.{name}"] = f"{found.name}/{name}"
            else:
                names[column] = str(found.name)
        return names, group

    def _refuse_missing(self, file: h5py.File, where: str) -> None:
        try:
            self._refuse_links(file, where)
        except (KeyError, AttributeError) as error:
            held: list[str] = []
            file.visit(lambda name: held.append(name) if len(held) < 8 else True)
            raise DataError(f"{self.path}: holds no {where!r}; it holds {held}") from error

    def _find(self, file: h5py.File) -> tuple[dict[str, str], h5py.Group]:
        """Column names -> paths in the file, and the group that holds them."""
        group: h5py.Group = file
        try:
            if "dataset" in file:
                self._refuse_links(file, "dataset")
                group = file["dataset"]
            keys = list(group.keys()) if isinstance(group, h5py.Group) else []
            input_key, target_key = choose_key(keys, INPUT_KEYS), choose_key(keys, TARGET_KEYS)
            quality_key = choose_key(keys, QUALITY_KEYS)
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self.path}: {group.name} {error}") from error
        if input_key is None:
            raise DataError(
                f"{self.path}: no array /dataset/inputs (the file holds {sorted(file.keys())[:6]}"
                f"{', dataset holds ' + str(sorted(keys)[:6]) if group is not file else ''}); "
                "name the one to take in inputs_path"
            )
        base = group.name.rstrip("/")
        for key in (input_key, target_key, quality_key, "metadata"):
            if key in keys:
                self._refuse_links(file, f"{base}/{key}")
        names = {"inputs": f"{base}/{input_key}"}
        if target_key is not None:
            target = group[target_key]
            if isinstance(target, h5py.Group):
                for name in target:
                    self._refuse_links(file, f"{base}/{target_key}/{name}")
                names |= {f"targets.{name}": f"{base}/{target_key}/{name}" for name in sorted(target)}
            else:
                names["targets"] = f"{base}/{target_key}"
        if quality_key is not None:
            names["quality"] = f"{base}/{quality_key}"
        elif isinstance(group.get("metadata"), h5py.Group) and "quality" in group["metadata"]:
            self._refuse_links(file, f"{base}/metadata/quality")
            names["quality"] = f"{base}/metadata/quality"
        return names, group

    def _check(self, file: h5py.File, name: str, where: str) -> int:
        """Rows of a data set; refuses what reads elsewhere, or declares more than the file holds."""
        data = file[where]
        if not isinstance(data, h5py.Dataset) or data.shape is None or not data.shape:
            raise DataError(f"{self.path}: {where} is not an array with one row per record")
        if data.is_virtual:
            raise DataError(
                f"{self.path}: {where} is a virtual data set, it reads other files; copy the data in"
            )
        if data.external:
            raise DataError(f"{self.path}: {where} is stored in {data.external[0][0]!r}; copy the data in")
        check_width(f"{self.path}: {where}", data.shape, data.dtype)
        check_filters(f"{self.path}: {where}", data)
        text = h5py.check_string_dtype(data.dtype)
        if text is None and data.dtype.kind not in "biuf":
            raise DataError(f"{self.path}: {where} holds {data.dtype}; wanted numbers or strings")
        if name == "quality" and (text is not None or data.ndim > 1):
            raise DataError(
                f"{self.path}: {where} holds {'text' if text else f'shape {data.shape}'}; wanted one number "
                "for each record"
            )
        if _is_text(data) and data.ndim > 1:
            raise DataError(f"{self.path}: {where} has shape {data.shape}; wanted one text for each record")
        if data.chunks:
            written, needed = data.id.get_num_chunks(), 1
            for size, chunk in zip(data.shape, data.chunks, strict=True):
                needed *= -(-size // chunk)
        else:
            written, needed = data.id.get_storage_size(), data.size * data.dtype.itemsize
        if written < needed:
            raise DataError(
                f"{self.path}: {where} declares shape {data.shape} but only {written} of {needed} "
                f"{'chunks' if data.chunks else 'bytes'} are in the file"
            )
        check_chunks(f"{self.path}: {where}", data)
        return int(data.shape[0])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_handles": {}, "_pid": -1}

    def _data(self, name: str) -> h5py.Dataset:
        if self._pid != os.getpid():
            # Opened before a fork: leave the parent's handle alone and open our own.
            self._handles, self._pid = {}, os.getpid()
            self._file = h5py.File(self.path, "r")
        if name not in self._handles:
            assert self._file is not None
            self._handles[name] = self._file[self.names[name]]
        return self._handles[name]

    def read_all(self, name: str) -> np.ndarray:
        """One column, whole; strings as Python objects."""
        with damage_told(self.path):
            return self._read(self._data(name), [0], [self._length])

    def _read(self, data: h5py.Dataset, begins: list[int], ends: list[int]) -> np.ndarray:
        """Several stretches of rows, one after the other in one array; texts as Python objects."""
        text = h5py.check_string_dtype(data.dtype)
        if text is not None and text.length is None:
            return self._texts(data, begins, ends, text.encoding)
        rows, at = np.empty((sum(ends) - sum(begins), *data.shape[1:]), data.dtype), 0
        for a, b in zip(begins, ends, strict=True):
            data.read_direct(rows, np.s_[a:b], np.s_[at : at + b - a])
            at += b - a
        return rows if text is None else np.char.decode(rows, text.encoding, "replace").astype(object)

    def _texts(self, data: h5py.Dataset, begins: list[int], ends: list[int], encoding: str) -> np.ndarray:
        """Texts of any length, a few at a time: how long one is shows when it is read."""
        limit = max(INFLATED_FLOOR, TEXT_SHARE * self._stored)
        step = max(TEXT_SHARE, INFLATED_FLOOR // self._stored)  # none is longer than the file
        space, memory = data.id.get_space(), h5py.h5t.py_create(data.dtype)
        texts: list[str] = []
        held = 0
        for a, b in zip(begins, ends, strict=True):
            for start in range(a, b, step):
                raw = np.empty(min(step, b - start), object)
                space.select_hyperslab((start,), raw.shape)
                data.id.read(h5py.h5s.create_simple(raw.shape), space, raw, memory)
                held += sum(map(len, raw))
                if held > limit:
                    raise DataError(
                        f"{self.path}: {data.name} holds over {limit / 1e6:.0f} MB of text in a file of "
                        f"{self._stored / 1e6:.3g} MB: its records share it; write each its own"
                    )
                texts += [text.decode(encoding, "replace") for text in raw]
        rows = np.empty(len(texts), object)
        rows[:] = texts
        return rows

    def _gather(self, name: str, indices: np.ndarray) -> Values:
        """Rows in any order: touched chunks are read once each, in file order."""
        data = self._data(name)
        order = np.argsort(indices, kind="stable")
        wanted = indices[order]
        cuts = np.flatnonzero(np.diff(wanted // self._block_rows)) + 1
        begins, ends = wanted[np.append(0, cuts)], wanted[np.append(cuts, len(wanted)) - 1] + 1
        lasts = np.cumsum(ends - begins)
        shift = np.repeat(lasts - ends, np.diff([0, *cuts, len(wanted)]))
        places = np.empty_like(order)
        places[order] = wanted + shift
        values = self._read(data, begins.tolist(), ends.tolist())[places]
        return values.tolist() if values.dtype.kind == "O" else values

    def _columns(self, indices: np.ndarray) -> Columns:
        with damage_told(self.path):
            columns = {name: self._gather(name, indices) for name in self.names}
        named = {k[8:]: v for k, v in columns.items() if k.startswith("targets.")}
        target: Targets = named or columns.get("targets")
        quality = columns.get("quality")
        return Columns(
            indices.astype(np.int64),
            columns["inputs"],
            target,
            None if quality is None else np.asarray(quality, np.float64),
        )

    def __len__(self) -> int:
        return self._length

    def gather(self, indices: np.ndarray) -> Columns:
        """See `Source.gather`."""
        return self._columns(np.asarray(indices, np.int64))

    def blocks(self) -> np.ndarray:
        """See `Blocked`: the chunks of the inputs, or stretches as long as a large chunk."""
        return np.arange(0, self._length, self._block_rows)

    def iterate(self) -> Iterator[Columns]:
        """See `Source.iterate`."""
        step = max(1, min(CHUNK_BYTES // self._row_bytes, 1 << 16))
        for start in range(0, self._length, step):
            yield self._columns(np.arange(start, min(start + step, self._length)))

    def locate(self, index: int) -> tuple[str, int]:
        """See `Source.locate`."""
        return self.paths[0], index

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        return {
            "format": self.format,
            "access": "in place",
            "records": self._length,
            "attributes": self._attributes,
            "metadata": self._metadata,
        }


def _is_text(data: h5py.Dataset) -> bool:
    """Whether its values are texts of any length, which lie elsewhere in the file."""
    text = h5py.check_string_dtype(data.dtype)
    return text is not None and text.length is None


def _shown(attributes: h5py.AttributeManager) -> dict[str, Any]:
    """Attributes as something JSON can hold, long ones cut."""
    found = {}
    for name in attributes:
        kind = attributes.get_id(name)
        # Many texts are read at once or not at all, and all may be one and the same in the file.
        many = kind.dtype.hasobject and (kind.shape or kind.dtype.kind != "O")
        found[name] = f"values of shape {kind.shape}" if many else _plain(attributes[name])
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value[:MAX_SHOWN].decode("utf-8", "replace")
    if isinstance(value, np.ndarray):
        return [_plain(v) for v in value.reshape(-1)[:8]]
    return value.item() if isinstance(value, np.generic) else str(value)[:MAX_SHOWN]
