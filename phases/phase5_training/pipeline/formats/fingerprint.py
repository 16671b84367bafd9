"""What tells the files of a data set from others, without reading them whole."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phase5_training.pipeline.formats.index_file import file_key

LISTED = 200  # files that are listed one by one; all of them count in the digest


def fingerprint(files: Sequence[Path]) -> dict[str, Any]:
    """Sizes and hashes of head and tail of files, in their order; a copy has the same.

    What changed in the middle of a large file and left its size is not seen: that would take a full read.

    Args:
        files: as the readers take them; what belongs to one (targets, a sidecar) counts too.

    Returns:
        ``files``: path, bytes and hash of each, the first 200; ``count``, and ``digest`` of all.
    """
    listed, digest = [], hashlib.sha256()
    every = [one for file in files for one in (file, *_companions(file))]
    for file in every:
        key = file_key(file, "")
        parts = f"{key['size']} {key['head']} {key['tail']}"
        found = hashlib.sha256(parts.encode()).hexdigest()[:32]
        digest.update(found.encode())
        listed.append({"path": str(file), "bytes": key["size"], "hash": found})
    return {"files": listed[:LISTED], "count": len(every), "digest": digest.hexdigest()[:32]}


def _companions(file: Path) -> list[Path]:
    if file.suffix == ".npy":
        beside = [file.with_name(f"{file.stem}{part}.npy") for part in ("_targets", "_quality")]
    elif file.suffix == ".bin":
        beside = [file.with_name(f"{file.name}.json"), file.with_suffix(".json")]
    else:
        return []
    return [path for path in beside if path.is_file()]
