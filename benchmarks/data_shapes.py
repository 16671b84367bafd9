"""JSON records of other shapes than plain numbers, for bench_data.py: text, escapes, keys that nobody reads.

What is compared does the same work: text becomes its UTF-8 bytes as int64, padded to the longest of the batch
(Forge: to a multiple of 8), a label of text its number in the sorted list of labels, numbers float32. "tokens
kept" encodes all texts when it opens, as Forge does; "json.load" encodes a sample whenever it is drawn.
"""

import importlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

BATCH, CLASSES, POOL = 64, 10, 4000  # records that are written again and again
SHAPES = ("other keys", "text", "unicode")
WORDS = ["the", "cat", "sat", "on", "mat", "hello"]
LETTERS = list('äöüßéñ漢字データ\u2028 abc"\\\n')
KEYS = {"other keys": ("input", "target"), "text": ("text", "label"), "unicode": ("input", "target")}


def shape_cases(shape: str) -> tuple[str, ...]:
    kept = () if shape == "other keys" else ("json.load, tokens kept",)
    return ("forge", "forge, in place", "json.load", *kept)


def _record(shape: str, i: int, rng: np.random.Generator) -> dict[str, Any]:
    label = int(rng.integers(CLASSES))
    if shape == "text":
        return {"text": " ".join(rng.choice(WORDS, 60)), "label": label}
    if shape == "unicode":
        return {"input": "".join(rng.choice(LETTERS, 200)), "target": "".join(rng.choice(LETTERS[:8], 5))}
    return {
        "id": i, "source": {"url": f"http://x/{i}", "tags": ["a", "b"]},
        "input": rng.integers(0, 256, 128).tolist(), "target": label,
        "metadata": {"quality": round(float(rng.random()), 3), "note": "n"},
    }  # fmt: skip


def write_shape(path: Path, shape: str, megabytes: int) -> int:
    """A file of about so many MB, half of its records with non-ASCII escaped; returns how many they are."""
    rng, count, size = np.random.default_rng(0), 0, 0
    pool = [json.dumps(_record(shape, i, rng), ensure_ascii=i % 2 == 0) for i in range(POOL)]
    with path.open("w", encoding="utf-8") as file:
        file.write('{"samples": [')
        while size < megabytes * 1_000_000:
            part = ", ".join(pool[i] for i in rng.integers(0, POOL, 2000).tolist())
            file.write((", " if count else "") + part)
            count, size = count + 2000, size + len(part.encode())
        file.write("]}")
    return count


class ShapedRecords(Dataset):
    def __init__(self, path: Path, shape: str, keep: bool) -> None:
        with path.open(encoding="utf-8") as file:
            self.records = json.load(file)["samples"]
        self.key, target = KEYS[shape]
        self.labels = [record[target] for record in self.records]
        if isinstance(self.labels[0], str):
            number = {label: i for i, label in enumerate(sorted(set(self.labels)))}
            self.labels = [number[label] for label in self.labels]
        self.kept = [self.encode(record[self.key]) for record in self.records] if keep else None

    def encode(self, value: Any) -> torch.Tensor:
        if isinstance(value, str):
            return torch.frombuffer(bytearray(value.encode()), dtype=torch.uint8).long()
        return torch.tensor(value, dtype=torch.float32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.encode(self.records[i][self.key]) if self.kept is None else self.kept[i], self.labels[i]


def _padded(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.nn.utils.rnn.pad_sequence([x for x, _ in samples], batch_first=True)
    return inputs, torch.tensor([y for _, y in samples])


def _opened(case: str, path: Path, shape: str) -> Any:
    if not case.startswith("forge"):
        data = ShapedRecords(path, shape, keep=case.endswith("kept"))
        collate = None if shape == "other keys" else _padded
        return DataLoader(data, batch_size=BATCH, shuffle=True, collate_fn=collate)
    from phase5_training import DataConfig, DataLoaderFactory

    options: dict[str, Any] = {"memory_limit_mb": 0} if case.endswith("place") else {}
    kind: Any = "features" if shape == "other keys" else "auto"
    config = DataConfig(batch_size=BATCH, input_kind=kind, max_length=None, **options)
    return DataLoaderFactory.create_loader(path, config)


def prepare_shape(case: str, path: Path, shape: str, threads: int) -> Any:
    """A turn: open, an epoch, another one."""
    torch.set_num_threads(threads)
    importlib.import_module("phase5_training.pipeline.data_loader" if case.startswith("forge") else "json")

    def turn() -> dict[str, Any]:
        marks = [(time.perf_counter(), time.process_time())]
        loader = _opened(case, path, shape)
        marks.append((time.perf_counter(), time.process_time()))
        for _ in range(2):
            samples = sum(len(b["target"] if isinstance(b, dict) else b[1]) for b in loader)
            marks.append((time.perf_counter(), time.process_time()))
        names, row = ("open", "epoch", "later"), {"samples": samples, "later_samples": samples}
        for name, before, after in zip(names, marks, marks[1:], strict=False):
            row |= {f"{name}_s": after[0] - before[0], f"{name}_cpu_s": after[1] - before[1]}
        return row

    return turn, {}
