"""What trackers' files hold, read without our code: {step: {name: figure}}."""

from __future__ import annotations

import json
import sqlite3
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

History = dict[int, dict[str, Any]]


def of_metrics(path: Path, layers: list[str] | None = None) -> History:
    """What metrics.jsonl holds, with the kind of a row before its names."""
    found: History = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        own = found.setdefault(row["step"], {})
        for key, value in row.items():
            name = f"{row['kind']}/{key}"
            if key in ("kind", "step") or value is None:
                continue
            if isinstance(value, list):
                for i, item in enumerate(value):
                    own[f"{name}/{layers[i] if layers else i}"] = item
            else:
                own[name] = int(value) if isinstance(value, bool) else value
    return found


def of_wandb(folder: Path) -> History:
    """The history in the one offline run below a folder.

    The file is a LevelDB log (blocks of 32 KiB, records with CRC, length and type) of protobuf records.
    """
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    found: History = {}
    for content in _leveldb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") != "history":
            continue
        items = {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
        }
        own = found.setdefault(items["_step"], {})
        for name, value in items.items():
            if not name.startswith("_"):
                assert name not in own, f"{name} twice at step {items['_step']}"
                own[name] = value
    return found


def _leveldb_records(content: bytes) -> Iterator[bytes]:
    assert content[:4] == b":W&B"
    at, parts = 7, []
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        checksum, length, kind = struct.unpack("<IHB", content[at : at + 7])
        payload = content[at + 7 : at + 7 + length]
        assert zlib.crc32(bytes([kind]) + payload) == checksum
        at += 7 + length
        parts.append(payload)
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def of_tensorboard(folder: Path) -> History:
    """The scalars, which are float32, and the words, where they change."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len(list(folder.glob("tensorboard/events.out.tfevents.*"))) == 1
    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    found: History = {}
    for name in read.Tags()["scalars"]:
        for event in read.Scalars(name):
            own = found.setdefault(event.step, {})
            assert name not in own, f"{name} twice at step {event.step}"
            own[name] = event.value
    for name in read.Tags()["tensors"]:
        for event in read.Tensors(name):
            (word,) = event.tensor_proto.string_val
            found.setdefault(event.step, {})[name] = word.decode()
    return found


def of_trackio(database: Path) -> History:
    """All rows of a data base with one run."""
    found: History = {}
    with sqlite3.connect(database) as connection:
        for step, metrics in connection.execute("select step, metrics from metrics order by id"):
            own = found.setdefault(step, {})
            for name, value in json.loads(metrics).items():
                assert name not in own, f"{name} twice at step {step}"
                own[name] = value
    return found
