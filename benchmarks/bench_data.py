"""Reading data: Forge against what people use, on files made for the purpose.

    python benchmarks/bench_data.py                    # everything: 23 minutes on two cores, 5 GB of disk
    python benchmarks/bench_data.py --parts json --mb 1000 --rounds 3
    python benchmarks/bench_data.py --parts hdf5 tokens streaming cache

Parts, each in rounds in which its cases take turns (files are in the page cache: warm):

    json       {"samples": [{"input": [128 ints], "target": label}]} of --mb: opening, a shuffled epoch, a
               part of the next; each turn is a process of its own. json.load is followed by a Dataset and a
               DataLoader, datasets by a DataLoader whose batches are one call each.
    hdf5       rows of 784 float32 and labels, shuffled: a Dataset that reads each sample from h5py, with a
               DataLoader, and Forge in place (memory_limit_mb=0); contiguous, and in gzip chunks
    tokens     blocks of 257 uint16 tokens of a .bin: Forge, and numpy.memmap indexed by hand
    streaming  the highest memory of a process that reads an epoch with streaming=True, a tenth of it for
               validation, of 100 MB and of 2 GB
    cache      JSON Lines of text, streamed, with the LRU cache and without, where it holds all or a tenth
    shapes     opening, an epoch and another for --mb / 25 of text, of text with escapes, and of records with
               keys that nobody reads (data_shapes.py); two minutes
    stall      real tasks in training: the share of the time in which steps waited for data

A row of --output is a case of a round, with seconds (wall and of the processor), and with the highest
resident size of its process in MB ("peak_mb") where that has one of its own.
"""

import argparse
import importlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from data_shapes import SHAPES, prepare_shape, shape_cases, write_shape
from data_stall import STALL_STEPS, prepare_stall
from interleave import CaseError, Worker, circumstances, quartiles, ratio_quartiles, write_rows

RECORD = Path(__file__).parent / "records" / "data.jsonl"
WIDTH, VOCABULARY, CLASSES = 128, 50257, 10
BATCH = 64
BLOCK = 22_000  # records of random numbers that are written again and again: 20 MB
PARTS = ("json", "hdf5", "tokens", "streaming", "cache", "shapes", "stall")
AGAINST = {  # ratios that the summary gives, round by round
    "json": (("forge", "json.load"), ("forge", "datasets")),
    "hdf5": (("forge", "h5py"),), "tokens": (("forge", "numpy.memmap"),), "cache": (("cache", "no cache"),),
    "shapes": tuple(
        (ours, theirs)
        for ours in ("forge", "forge, in place") for theirs in ("json.load", "json.load, tokens kept")
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--mb", type=int, default=1000, help="size of the JSON file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", help="where files are made, and removed; default a temporary folder")
    parser.add_argument("--output", type=Path, default=RECORD)
    found = parser.parse_args()
    parts: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
        "json": json_part, "hdf5": hdf5_part, "tokens": tokens_part, "streaming": streaming_part,
        "cache": cache_part, "shapes": shapes_part, "stall": stall_part,
    }  # fmt: skip
    for name in found.parts:
        rows = []
        with tempfile.TemporaryDirectory(dir=found.folder) as folder:
            for row in parts[name](Path(folder), found):
                rows.append({"part": name, **row})
                print(json.dumps(rows[-1]), flush=True)
        for line in summary(name, rows):
            print(line)
        write_rows(found.output, [{**row, "threads": found.threads, **circumstances()} for row in rows])


def peak_mb() -> float:
    """VmHWM of this process; ru_maxrss would count what its parent held when it was started."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


class Clock:
    """Wall and processor seconds since it was made or last read."""

    def __init__(self) -> None:
        self.lap()

    def lap(self) -> tuple[float, float]:
        now = time.perf_counter(), time.process_time()
        last = getattr(self, "_last", now)
        self._last = now
        return now[0] - last[0], now[1] - last[1]


def alone(prepare: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """One turn of a case in a fresh process."""
    try:
        worker = Worker(prepare, *args)
    except CaseError as error:
        return {"error": str(error)}
    try:
        return dict(worker.turn())
    except CaseError as error:
        return {"error": str(error)}
    finally:
        worker.close()


# -- JSON ---------------------------------------------------------------------------------------------


def write_json(path: Path, megabytes: int, seed: int = 0) -> int:
    """Records of random tokens and labels; returns how many. A block of 20 MB is repeated."""
    rng, count, size = np.random.default_rng(seed), 0, 0
    blocks = []
    for _ in range(max(1, min(megabytes // 20, 5))):
        rows, labels = rng.integers(0, VOCABULARY, (BLOCK, WIDTH)), rng.integers(0, CLASSES, BLOCK)
        records = zip(rows.tolist(), labels.tolist(), strict=True)
        blocks.append(", ".join(f'{{"input": {row}, "target": {label}}}' for row, label in records).encode())
    with path.open("wb") as file:
        file.write(b'{"samples": [')
        while size < megabytes * 1_000_000:
            file.write((b", " if count else b"") + blocks[count // BLOCK % len(blocks)])
            size, count = size + len(blocks[0]), count + BLOCK
        file.write(b"]}")
    return count


def forge_loaders(path: Path, **options: Any) -> Any:
    from phase5_training import DataConfig, DataLoaderFactory

    return DataLoaderFactory.create_loaders(path, DataConfig(batch_size=BATCH, **options))


def forge_loader(path: Path, **options: Any) -> Any:
    return forge_loaders(path, **options)[0]


def open_with_forge(path: Path, folder: Path) -> Any:
    return forge_loader(path)


class Records(Dataset):
    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.tensor(self.records[i]["input"]), self.records[i]["target"]


def open_with_json(path: Path, folder: Path) -> Any:
    with path.open() as file:
        return DataLoader(Records(json.load(file)["samples"]), batch_size=BATCH, shuffle=True)


def open_with_datasets(path: Path, folder: Path) -> Any:
    datasets = importlib.import_module("datasets")
    datasets.disable_progress_bars()
    data = datasets.load_dataset(
        "json", data_files=str(path), field="samples", split="train", cache_dir=str(folder / "datasets")
    ).with_format("torch")
    # A batch is one call for all of its rows: faster than the DataLoader's own way.
    sampler = BatchSampler(RandomSampler(data), BATCH, drop_last=False)
    return DataLoader(data, sampler=sampler, batch_size=None)


OPENERS = {"forge": open_with_forge, "json.load": open_with_json, "datasets": open_with_datasets}


def prepare_json(name: str, path: Path, folder: Path, threads: int, part: int) -> Any:
    """A turn: open, one epoch, and ``part`` batches of the next."""
    torch.set_num_threads(threads)
    packages = {"forge": "phase5_training.pipeline.data_loader", "datasets": "datasets"}
    importlib.import_module(packages.get(name, "json"))
    imported = peak_mb()

    def turn() -> dict[str, Any]:
        clock = Clock()
        began = time.perf_counter()
        loader = OPENERS[name](path, folder)
        opened = clock.lap()
        samples, first = 0, 0.0
        for batch in loader:
            first = first or time.perf_counter() - began
            samples += len(_target(batch))
        epoch = clock.lap()
        later = 0
        for number, batch in enumerate(loader):
            later += len(_target(batch))
            if number + 1 == part:
                break
        rest = clock.lap()
        return {
            "samples": samples, "open_s": opened[0], "open_cpu_s": opened[1], "first_batch_s": first,
            "epoch_s": epoch[0], "epoch_cpu_s": epoch[1], "later_samples": later, "later_s": rest[0],
            "later_cpu_s": rest[1], "peak_mb": peak_mb(), "imported_mb": imported,
        }  # fmt: skip

    return turn, {}


def _target(batch: Any) -> Any:
    return batch["target"] if isinstance(batch, dict) else batch[1]


def json_part(folder: Path, found: argparse.Namespace) -> Iterator[dict[str, Any]]:
    path = folder / "records.json"
    count = write_json(path, found.mb)
    size = path.stat().st_size
    for number in range(found.rounds):
        for case in ("forge", "forge, indexed before", "json.load", "datasets"):
            if case == "forge":
                for side in folder.glob(".*.forge-index"):
                    side.unlink()
            shutil.rmtree(folder / "datasets", ignore_errors=True)
            name = case.split(",")[0]
            row = alone(prepare_json, name, path, folder, found.threads, count // BATCH // 4)
            yield {"case": case, "round": number, "bytes": size, "records": count, **row}


# -- HDF5 ---------------------------------------------------------------------------------------------


class Hdf5Rows(Dataset):
    def __init__(self, path: Path) -> None:
        h5py = importlib.import_module("h5py")
        file = h5py.File(path, "r")
        self.inputs, self.targets = file["dataset/inputs"], file["dataset/targets"]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.inputs[i]), int(self.targets[i])


def timed(batches: Iterator[Any], limit: int) -> dict[str, float]:
    """Seconds of ``limit`` samples, or of all."""
    clock, samples = Clock(), 0
    for batch in batches:
        samples += len(_target(batch))
        if samples >= limit:
            break
    wall, cpu = clock.lap()
    return {"samples": samples, "seconds": wall, "cpu_s": cpu}


def hdf5_part(folder: Path, found: argparse.Namespace) -> Iterator[dict[str, Any]]:
    h5py = importlib.import_module("h5py")
    torch.set_num_threads(found.threads)
    n = 60_000
    rng = np.random.default_rng(0)
    rows, labels = np.round(rng.normal(size=(n, 784)), 2).astype(np.float32), rng.integers(0, CLASSES, n)
    for layout, options in (("contiguous", {}), ("gzip chunks of 64", {"chunks": True})):
        path = folder / f"{len(options)}.h5"
        with h5py.File(path, "w") as file:
            for name, data in (("inputs", rows), ("targets", labels)):
                chunks = {"chunks": (64, *data.shape[1:]), "compression": "gzip", "compression_opts": 1}
                given = chunks if options else {}
                file.create_dataset(f"dataset/{name}", data=data, **given)
        ours = forge_loader(path, memory_limit_mb=0)
        theirs = DataLoader(Hdf5Rows(path), batch_size=BATCH, shuffle=True)
        for number in range(found.rounds):
            for case, loader, limit in (("forge", ours, n), ("h5py", theirs, n // 10)):
                yield {"case": case, "layout": layout, "round": number, **timed(iter(loader), limit)}


# -- tokens -------------------------------------------------------------------------------------------


def by_hand(path: Path, block: int) -> Iterator[dict[str, torch.Tensor]]:
    """Shuffled blocks from a memory map, as a training script reads them."""
    tokens = np.memmap(path, np.uint16, "r")
    order = np.random.default_rng(0).permutation((len(tokens) - 1) // block)
    columns = np.arange(block + 1)
    for start in range(0, len(order), BATCH):
        rows = torch.from_numpy(tokens[order[start : start + BATCH, None] * block + columns].astype(np.int64))
        yield {"input": rows[:, :-1].contiguous(), "target": rows[:, 1:].contiguous()}


def tokens_part(folder: Path, found: argparse.Namespace) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(found.threads)
    path, block = folder / "tokens.bin", 256
    np.random.default_rng(0).integers(0, VOCABULARY, 128 << 20).astype(np.uint16).tofile(path)
    path.with_name("tokens.bin.json").write_text(json.dumps({"dtype": "uint16", "vocab_size": VOCABULARY}))
    loader = forge_loader(path, max_length=block)
    for number in range(3 * found.rounds + 1):
        for case, batches in (("forge", iter(loader)), ("numpy.memmap", by_hand(path, block))):
            row = timed(batches, 1 << 30)
            if number:  # the first round warms the page cache
                yield {"case": case, "round": number, **row}


# -- streaming ----------------------------------------------------------------------------------------


def prepare_stream(path: Path, threads: int) -> Any:
    torch.set_num_threads(threads)
    importlib.import_module("phase5_training.pipeline.data_loader")
    imported = peak_mb()

    def turn() -> dict[str, Any]:
        clock = Clock()
        loaders = forge_loaders(path, streaming=True, validation_split=0.1)
        opened = clock.lap()
        samples = sum(len(batch["index"]) for loader in loaders for batch in loader)
        epoch = clock.lap()
        return {
            "samples": samples, "open_s": opened[0], "epoch_s": epoch[0], "epoch_cpu_s": epoch[1],
            "peak_mb": peak_mb(), "imported_mb": imported,
        }  # fmt: skip

    return turn, {}


def write_stream(path: Path, megabytes: int) -> None:
    """A file of a format, of about so many MB."""
    if path.suffix == ".json":
        write_json(path, megabytes)
    elif path.suffix == ".jsonl":
        line = b'{"input": "' + b"to be or not to be " * 40 + b'", "target": %d}\n'
        block = b"".join(line % (i % CLASSES) for i in range(5_000))
        with path.open("wb") as file:
            for _ in range(megabytes * 1_000_000 // len(block)):
                file.write(block)
    elif path.suffix == ".npy":
        n = megabytes * 1_000_000 // (WIDTH * 4)
        rows = np.lib.format.open_memmap(path, "w+", np.float32, (n, WIDTH))
        rows[:] = 1
        np.save(path.with_name(f"{path.stem}_targets.npy"), np.arange(n) % CLASSES)
    elif path.suffix == ".bin":
        np.full(megabytes * 500_000, 7, np.uint16).tofile(path)
        path.with_name(f"{path.name}.json").write_text('{"dtype": "uint16", "vocab_size": 50257}')
    else:
        h5py = importlib.import_module("h5py")
        n = megabytes * 1_000_000 // (WIDTH * 4)
        with h5py.File(path, "w") as file:
            data = file.create_dataset("dataset/inputs", (n, WIDTH), "f4", chunks=(256, WIDTH))
            for start in range(0, n, 1 << 16):
                data[start : start + (1 << 16)] = 1
            file["dataset/targets"] = np.arange(n) % CLASSES


def streaming_part(folder: Path, found: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for suffix in ("json", "jsonl", "npy", "bin", "h5"):
        for megabytes in (100, 2 * found.mb):
            path = folder / f"{megabytes}.{suffix}"
            write_stream(path, megabytes)
            size = path.stat().st_size
            yield {"case": f".{suffix}", "bytes": size, **alone(prepare_stream, path, found.threads)}
            for file in folder.iterdir():
                file.unlink()


# -- cache --------------------------------------------------------------------------------------------


def cache_part(folder: Path, found: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from phase5_training.pipeline.data_collate import SampleCache

    torch.set_num_threads(found.threads)
    words = ["to", "be", "or", "not", "to", "be", "that", "is", "the", "question"]
    rng = np.random.default_rng(0)
    for records, length in ((1_000, 20), (1_000, 2_000), (10_000, 20), (10_000, 200)):
        path = folder / f"{records}-{length}.jsonl"
        with path.open("w") as file:
            for i in range(records):
                text = " ".join(rng.choice(words, length))
                file.write(json.dumps({"input": text, "target": i % CLASSES}) + "\n")
        cases = {
            "cache": forge_loader(path, streaming=True, cache_size=records),
            "no cache": forge_loader(path, streaming=True, cache_size=0),
        }
        # A loader leaves out a cache that cannot hold all; here it is wanted.
        prepared = cases["cache"]._prepared
        prepared._cache = SampleCache(prepared.source, prepared.collator, 1000, 1 << 30)
        for number in range(3 * found.rounds):
            for case, loader in cases.items():
                row = timed(iter(loader), 1 << 30)
                rate = loader.description()["cache_hit_rate"]
                if number:  # in the first epoch nothing is kept yet
                    yield {"case": case, "records": records, "words": length, "hit_rate": rate, **row}


# -- shapes -------------------------------------------------------------------------------------------


def shapes_part(folder: Path, found: argparse.Namespace) -> Iterator[dict[str, Any]]:
    paths = {shape: folder / f"{number}.json" for number, shape in enumerate(SHAPES)}
    counts = {shape: write_shape(path, shape, max(found.mb // 25, 1)) for shape, path in paths.items()}
    for number in range(found.rounds):
        for shape, path in paths.items():
            for case in shape_cases(shape):
                for side in folder.glob(".*.forge-index"):
                    side.unlink()
                row = alone(prepare_shape, case, path, shape, found.threads)
                size = path.stat().st_size
                yield {"case": case, "layout": shape, "round": number, "bytes": size,
                       "records": counts[shape], **row}  # fmt: skip


# -- stall --------------------------------------------------------------------------------------------


def stall_part(folder: Path, found: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for number in range(found.rounds):
        for name, steps in STALL_STEPS.items():
            row = alone(prepare_stall, name, steps, folder, found.threads)
            yield {"case": name, "round": number, **row}


# -- summary ------------------------------------------------------------------------------------------


def median(rows: list[dict[str, Any]], figure: Callable[[dict[str, Any]], float]) -> list[float]:
    return [round(q, 4) for q in quartiles([figure(row) for row in rows])]


def summary(part: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Quartiles of what the part is about, by case."""
    good = [row for row in rows if "error" not in row]
    figures: dict[str, Callable[[dict[str, Any]], float]] = {
        "samples/s": lambda row: row["samples"] / row["seconds"],
        "samples/cpu s": lambda row: row["samples"] / row["cpu_s"],
    }
    if part == "json":
        figures = {
            "first batch, s": lambda row: row["first_batch_s"],
            "samples/s, opening and first epoch": lambda row: (
                row["samples"] / (row["open_s"] + row["epoch_s"])
            ),
            "the same by cpu": lambda row: row["samples"] / (row["open_cpu_s"] + row["epoch_cpu_s"]),
            "samples/s, first epoch without opening": lambda row: row["samples"] / row["epoch_s"],
            "samples/s, later": lambda row: row["later_samples"] / row["later_s"],
            "later by cpu": lambda row: row["later_samples"] / row["later_cpu_s"],
            "peak MB": lambda row: row["peak_mb"],
        }
    elif part == "shapes":
        figures = {
            "samples/s, opening and first epoch": lambda row: (
                row["samples"] / (row["open_s"] + row["epoch_s"])
            ),
            "the same by cpu": lambda row: row["samples"] / (row["open_cpu_s"] + row["epoch_cpu_s"]),
            "samples/s, later": lambda row: row["later_samples"] / row["later_s"],
            "later by cpu": lambda row: row["later_samples"] / row["later_cpu_s"],
        }
    elif part == "streaming":
        figures = {"peak MB": lambda row: row["peak_mb"]}
    elif part == "stall":
        figures = {
            "share of the time waited for data": lambda row: row["wait_share"],
            "the same by cpu": lambda row: row["cpu_share"],
        }

    def label(row: dict[str, Any], *case: str) -> str:
        return " ".join(str(row[k]) for k in (*case, "layout", "bytes", "records", "words") if k in row)

    for name in dict.fromkeys(label(row, "case") for row in good):
        own = [row for row in good if label(row, "case") == name]
        for figure, of in figures.items():
            yield f"{part} {name}: {figure} {median(own, of)} (quartiles of {len(own)})"
    for ours, theirs in AGAINST.get(part, ()):
        for name in dict.fromkeys(map(label, good)):
            own, base = ([r for r in good if label(r) == name and r["case"] == c] for c in (ours, theirs))
            if len(own) == len(base) > 0:
                for figure, of in figures.items():
                    ratios = ratio_quartiles(list(map(of, own)), list(map(of, base)))
                    pair = f"{part} {name} {ours} / {theirs}: {figure} {ratios}"
                    yield f"{pair} (quartiles of {len(own)} rounds)"
    if part == "streaming":
        for case in dict.fromkeys(row["case"] for row in good):
            small, large = (row["peak_mb"] for row in good if row["case"] == case)
            yield f"streaming {case}: peak of the large file / of the small one {large / small:.3f}"
    for row in rows:
        if "error" in row:
            yield f"{part} {label(row, 'case')}: {row['error']}"


if __name__ == "__main__":
    main()
