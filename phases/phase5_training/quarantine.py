"""Records left out while data are opened, until the run has a folder to list them in."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any


class Quarantine:
    """A list of records on disk: a damaged file may bring millions.

    Example:
        >>> quarantine = Quarantine()
        >>> quarantine.append({"file": "a.jsonl", "index": 7, "reason": "label"})
        >>> [record["index"] for record in quarantine], len(quarantine)
        ([7], 1)
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile("w+", encoding="ascii")  # noqa: SIM115 - closed with the list
        self._count = 0

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record: file, index, reason (the name of a check) and detail."""
        self._file.write(json.dumps(dict(record)) + "\n")
        self._count += 1

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._file.seek(0)
        for line in self._file:
            yield json.loads(line)
        self._file.seek(0, 2)
