"""Map-style torch Datasets as a source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from phase5_training.errors import DataError, UsageError
from phase5_training.pipeline.formats.columns import Columns
from phase5_training.pipeline.formats.objects import source_from_arrays
from phase5_training.pipeline.formats.record_columns import RecordColumns
from phase5_training.pipeline.formats.source import Access, Source

SAMPLED = 1000  # items of a Dataset looked at before training; each may cost a decoded image


def open_dataset(dataset: Any, *, full_scan: bool = False) -> Source:
    """A map-style torch Dataset (or anything with a length and items) as a source.

    Args:
        dataset: items are ``(x, y)``, ``x``, or dicts with an input and perhaps a target.
        full_scan: look at every item before training, not at a sample.
    """
    if isinstance(dataset, TensorDataset):
        if len(dataset.tensors) > 2:
            raise UsageError(
                f"the TensorDataset has {len(dataset.tensors)} tensors; wanted inputs, or inputs and targets"
            )
        arrays = dict(zip(("inputs", "targets"), dataset.tensors, strict=False))
        return source_from_arrays(arrays, "dataset", "TensorDataset")
    return DatasetSource(dataset, full_scan)


class DatasetSource:
    """Reads a map-style Dataset item by item, or through its ``__getitems__``."""

    format = "dataset"
    access: Access = "mapped"  # not cached: an item may be a fresh random augmentation
    vocab_size: int | None = None

    def __init__(self, dataset: Any, full_scan: bool = False) -> None:
        self.dataset, self.paths, self._full = dataset, [type(dataset).__name__], full_scan
        if not len(dataset):
            raise DataError(f"{self.paths[0]}: the data set is empty; wanted at least one item")
        self._convert = RecordColumns()

    def __len__(self) -> int:
        return len(self.dataset)

    def gather(self, indices: np.ndarray) -> Columns:
        """See `Source.gather`."""
        index = indices.tolist()
        if hasattr(self.dataset, "__getitems__"):
            items = self.dataset.__getitems__(index)
        else:
            items = [self.dataset[i] for i in index]
        return self._convert([as_record(item) for item in items], index)

    def iterate(self) -> Iterator[Columns]:
        """Items in order: all of them, or an even sample (see `open_dataset`)."""
        n = len(self)
        index = np.arange(n)
        if not self._full and n > SAMPLED:
            index = np.unique(np.linspace(0, n - 1, SAMPLED).astype(np.int64))
        for start in range(0, len(index), 256):
            yield self.gather(index[start : start + 256])

    def locate(self, index: int) -> tuple[str, int]:
        """See `Source.locate`."""
        return self.paths[0], index

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        return {"format": self.format, "access": "items", "records": len(self), "class": self.paths[0]}


def as_record(item: Any) -> Any:
    """An item of a Dataset as a record."""
    if isinstance(item, Mapping):
        return item
    if isinstance(item, (tuple, list)) and 1 <= len(item) <= 2:
        return dict(zip(("input", "target"), item, strict=False))
    return {"input": item}


def is_map_style(source: Any) -> bool:
    """Whether ``source`` is to be read item by item: a map-style Dataset, torch's or Hugging Face's."""
    if isinstance(source, IterableDataset):
        return False
    return isinstance(source, Dataset) or (hasattr(source, "__getitem__") and hasattr(source, "column_names"))
