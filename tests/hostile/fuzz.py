"""Fuzzing of every reader: valid files, changed in places, against the plain readers of `reference.py`.

    PYTHONPATH=tests python -m hostile.fuzz --seconds 60

Each changed file is read in the sandbox of `sandbox.py`. It must be refused with a `DataError`, or its bad
records left out; what is kept must be what the plain reader finds at the same place. Hypothesis makes the
changes and shrinks a file that fails.
"""

import argparse
import gzip
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import safetensors.numpy
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from hostile.reference import BLOCK, READERS
from hostile.sandbox import run
from phase5_training.errors import DataError
from phase5_training.pipeline.data_loader import DataConfig, DataLoaderFactory

X = np.arange(24, dtype=np.float32).reshape(8, 3) / 4
K = np.arange(24, dtype=np.int64).reshape(8, 3)
Y = np.arange(8) % 3
RECORDS = [{"input": X[i].tolist(), "target": int(Y[i]), "metadata": {"quality": 0.5}} for i in range(8)]
TABLE = pa.table({"input": X.tolist(), "target": Y.tolist()})
TEXTS = [{"text": f'words "{i}" \\ é: [', "label": i % 3} for i in range(8)]
OTHER_KEYS = [{"id": {"a": [i, "]"]}, **record, "note": 'é "'} for i, record in enumerate(RECORDS)]
MANY = 10  # so many times these make more records than the readers take to learn their form
MODES: list[dict[str, Any]] = [
    {},
    {"memory_limit_mb": 0},
    {"streaming": True},
    {"streaming": True, "cache_size": 0},
]


def lines(records: list[dict]) -> bytes:
    return "\n".join(map(json.dumps, records)).encode()


def by_file(save: Callable[[Path], Any], ending: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"seed{ending}"
        save(path)
        return path.read_bytes()


def save_hdf5(path: Path, **options: Any) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("dataset/inputs", data=X, **options)
        file["dataset/targets"] = Y
        file["dataset"].attrs["made"] = "here"


def save_arrow(path: Path, new: Callable[..., Any] = pa.ipc.new_file, packed: str | None = None) -> None:
    with new(path, TABLE.schema, options=pa.ipc.IpcWriteOptions(compression=packed)) as file:
        file.write_table(TABLE, 3)


def seeds() -> dict[str, list[bytes]]:
    """Valid files of each format."""
    import pickle

    both = {"inputs": X, "targets": Y}
    return {
        ".json": [
            json.dumps({"samples": RECORDS}).encode(), json.dumps(TEXTS, indent=1).encode(),
            json.dumps({"inputs": X.tolist(), "targets": Y.tolist()}).encode(),
            json.dumps(TEXTS * MANY, ensure_ascii=False).encode(), json.dumps(OTHER_KEYS * MANY).encode(),
        ],
        ".jsonl": [
            lines(RECORDS), lines(TEXTS), lines([{"input": k, "target": 0} for k in K.tolist()]),
            lines(TEXTS * MANY), lines(OTHER_KEYS * MANY),
        ],
        ".npy": [
            by_file(lambda p: np.save(p, X), ".npy"),
            by_file(lambda p: np.save(p, np.asfortranarray(K)), ".npy"),
        ],
        ".npz": [
            by_file(lambda p: np.savez(p, **both), ".npz"),
            by_file(lambda p: np.savez_compressed(p, **both), ".npz"),
        ],
        ".safetensors": [by_file(lambda p: safetensors.numpy.save_file(both, p), ".safetensors")],
        ".h5": [
            by_file(save_hdf5, ".h5"),
            by_file(lambda p: save_hdf5(p, chunks=(3, 2), compression="gzip", shuffle=True), ".h5"),
        ],
        ".pkl": [pickle.dumps(value, n) for value in (both, RECORDS, TEXTS) for n in (2, 4, 5)],
        ".pt": [by_file(lambda p: torch.save({k: torch.from_numpy(v) for k, v in both.items()}, p), ".pt")],
        ".bin": [np.arange(100, dtype=np.uint16).tobytes()],
        ".txt": ["some text: ü ".encode() * 9],
        ".jsonl.gz": [gzip.compress(lines(RECORDS))],
        ".json.gz": [gzip.compress(json.dumps(RECORDS).encode())],
        ".jsonl.zst": [zstandard.compress(lines(TEXTS))],
        ".csv": [b"a,b,label\n" + b"".join(b"%d,%d.5,%d\n" % (i, i, i % 3) for i in range(8))],
        ".parquet": [
            by_file(lambda p: parquet.write_table(TABLE, p), ".parquet"),
            by_file(lambda p: parquet.write_table(TABLE, p, row_group_size=3), ".parquet"),
        ],
        ".arrow": [
            by_file(save_arrow, ".arrow"),
            by_file(lambda p: save_arrow(p, packed="zstd"), ".arrow"),
            by_file(lambda p: save_arrow(p, pa.ipc.new_stream), ".arrow"),
        ],
    }  # fmt: skip


COMPANIONS = {
    ".npy": ("a_targets.npy", by_file(lambda p: np.save(p, Y), ".npy")),
    ".bin": ("a.bin.json", b'{"dtype": "uint16", "vocab_size": 70000}'),
}
STREAMS = (".bin", ".txt")
EXTREMES = [0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
WORDS = [
    b"[", b"]", b"{", b"}", b'"', b"\\", b",", b":", b"\n", b"-", b"e9", b"1e999", b".", b"NaN", b"null",
    b"true", b"0", b"9" * 20, b'"input"', b'"samples"', b"\\ud800", b"\\u0000", b"\xff", b"\xef\xbb\xbf",
    b"\x00" * 8, b"(", b")", b"'", b"O", b"F32", b"shape", b"<f8", b"PK\x01\x02", b"\x94", b"\x85",
    b"R", b"b", b"h\x00",
]  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One change of a file: ``kind`` at a place, with a length and a value."""

    kind: str
    place: int
    length: int
    value: int

    def __call__(self, raw: bytes) -> bytes:
        at = self.place % (len(raw) + 1)
        end = min(at + self.length, len(raw))
        if self.kind == "cut":
            return raw[:at]
        if self.kind == "delete":
            return raw[:at] + raw[end:]
        if self.kind == "repeat":
            return raw[:end] + raw[at:end] * (1 + self.value % 3) + raw[end:]
        if self.kind == "byte":
            return raw[:at] + bytes([self.value % 256]) + raw[at + 1 :]
        if self.kind == "bit":
            return raw[:at] + bytes(b ^ (1 << self.value % 8) for b in raw[at : at + 1]) + raw[at + 1 :]
        if self.kind == "word":
            word = WORDS[self.value % len(WORDS)]
            return raw[:at] + word + (raw[at:] if self.length % 2 else raw[at + len(word) :])
        width = (1, 2, 4, 8)[self.length % 4]
        number = EXTREMES[self.value % len(EXTREMES)] % (1 << 8 * width)
        return raw[:at] + number.to_bytes(width, "little") + raw[at + width :]


places = st.integers(0, 200) | st.integers(0, 1 << 14)
changes = st.lists(
    st.builds(
        Change, kind=st.sampled_from(["byte", "bit", "word", "number", "cut", "delete", "repeat"]),
        place=places, length=st.integers(1, 40), value=st.integers(0, 1 << 16),
    ),
    max_size=3,
)  # fmt: skip


def read_both(path: Path, options: Mapping[str, Any]) -> str:
    """Read a file with Forge and plainly; says how it ended, "differs ..." where the two do not agree."""
    ending = path.name.removeprefix("a")
    config = DataConfig(
        invalid_records="drop", max_dropped_share=1.0, shuffle=False,
        max_length=BLOCK if ending in STREAMS else None,
        task=None if ending in STREAMS else "classification", **options,
    )  # fmt: skip
    dropped: list[dict] = []
    try:
        loader = DataLoaderFactory.create_loader(path, config, quarantine=dropped.append)
        batches = list(loader)
    except DataError as error:
        return "refused" if str(path) in str(error) else f"a message without the file: {error}"
    wanted, spec = READERS[ending](path), loader.spec
    lost = {record["index"] for record in dropped}
    kept = [int(i) for batch in batches for i in batch["index"]]
    if sorted([*kept, *lost]) != list(range(len(wanted))):
        return f"differs: {len(kept)} kept and {len(lost)} left out of {len(wanted)}"
    for batch in batches:
        for row, i in enumerate(batch["index"].tolist()):
            record = wanted[i]
            if record is None:
                return f"differs: record {i} is not sound, and was kept"
            for ours, plain in ((batch["input"][row], record[0]), (batch["target"][row], record[1])):
                if not same(ours.numpy(), plain, spec.class_names):
                    return f"differs: record {i} is {ours.tolist()}, and was {plain!r}"
    return "kept" if not lost else "left out some"


def same(ours: np.ndarray, plain: Any, names: tuple[str, ...] | None) -> bool:
    """Whether a row of a batch is what the plain reader found."""
    if isinstance(plain, str) and ours.ndim:
        raw = plain.encode()
        return bytes(ours[: len(raw)].tolist()) == raw and not ours[len(raw) :].any()
    if isinstance(plain, str):
        return names is not None and names[int(ours)] == plain
    if hasattr(plain, "numpy"):
        plain = plain.numpy()
    with np.errstate(all="ignore"):
        wanted = np.asarray(plain).astype(ours.dtype)
    return wanted.shape == ours.shape and bool(np.array_equal(wanted, ours))


def fuzz(ending: str, seconds: float, folder: Path, *, derandomize: bool = False) -> Counter[str]:
    """Change files of one format for so many seconds.

    Returns:
        How the files ended: refused, kept, left out some.

    Raises:
        AssertionError: a file that crashed, hung, took too much, or was read wrongly; it stays in
            ``folder``.
    """
    outcomes: Counter[str] = Counter()
    known, end = seeds()[ending], time.monotonic() + seconds

    @given(seed=st.sampled_from(known), made=changes, options=st.sampled_from(MODES))
    @settings(max_examples=50, deadline=None, database=None, derandomize=derandomize,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    def one(seed: bytes, made: list[Change], options: dict[str, Any]) -> None:
        for change in made:
            seed = change(seed)
        place = folder / "data"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        path = place / f"a{ending}"
        path.write_bytes(seed)
        if ending in COMPANIONS:
            name, content = COMPANIONS[ending]
            (place / name).write_bytes(content)
        found = run(lambda: read_both(path, options), place, memory=2 << 30, seconds=5)
        said = found.value if found.ended == "returned" else f"{found.ended} {found.error} {found.message}"
        assert said in ("refused", "kept", "left out some"), f"{path} {options}: {said}\n{found.trace}"
        assert not found.forbidden, found.forbidden
        assert found.peak < 96 << 20, f"{path} {options}: took {found.peak >> 20} MB"
        assert made or options or said == "kept", "a sound file"
        outcomes[said] += 1

    one()
    while time.monotonic() < end:
        one()
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="for all readers together")
    parser.add_argument("--only", nargs="+", default=sorted(READERS), help="endings, as .json")
    found = parser.parse_args()
    for ending in found.only:
        with tempfile.TemporaryDirectory() as folder:
            outcomes = fuzz(ending, found.seconds / len(found.only), Path(folder))
        print(f"{ending:14} {sum(outcomes.values()):6} files: {dict(outcomes)}", flush=True)


if __name__ == "__main__":
    main()
