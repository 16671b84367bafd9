"""Batches that the memory does not hold: refused before a run where they can be foreseen, else in a line."""

import json
import resource
import subprocess
import sys

import numpy as np
import pytest

from phase5_training.errors import DataError
from phase5_training.pipeline import data_prepared
from phase5_training.pipeline.data_config import DataConfig
from phase5_training.pipeline.data_loader import DataLoaderFactory
from phase5_training.pipeline.formats.columns import Ragged

LONGEST = 400


@pytest.fixture
def texts(tmp_path):
    """100 short texts, and one of 400 bytes; with labels, and without."""
    labelled, plain = tmp_path / "labelled.jsonl", tmp_path / "plain.jsonl"
    rows = [{"input": "x" * (LONGEST if i == 77 else 9), "target": i % 2} for i in range(100)]
    labelled.write_text("\n".join(map(json.dumps, rows)))
    plain.write_text("\n".join(json.dumps({"text": row["input"]}) for row in rows))
    return labelled, plain


@pytest.fixture
def memory(monkeypatch):
    def limited(size):
        monkeypatch.setattr(data_prepared, "usable_memory", lambda: size)

    return limited


def loader(path, **options):
    return DataLoaderFactory.create_loader(path, DataConfig(**{"batch_size": 16, **options}))


def test_one_long_text_among_short_ones(texts, memory):
    # A batch of int64 in three copies, and no more than half of the memory.
    needed = 2 * 3 * 8 * LONGEST * 16
    memory(needed)
    loader(texts[0])
    memory(needed - 2)
    with pytest.raises(DataError) as caught:
        loader(texts[0])
    assert str(caught.value) == (
        f"{texts[0]}: the longest sample has 400 tokens, and to pad a batch of 16 to it takes 0.0 GB, "
        "more than half of the memory here (0.0 GB); set max_length, to which longer ones are cut, "
        "or batch_size=15"
    )
    loader(texts[0], batch_size=15)
    loader(texts[0], max_length=LONGEST - 1)
    with pytest.raises(DataError, match="more than half"):
        loader(texts[0], bucket_by_length=True)  # the batch of the longest would be as wide
    with pytest.raises(DataError, match=r"batch_size=7$"):
        loader(texts[0], num_workers=2)
    loader(texts[0], batch_size=30, world_size=2)
    with pytest.raises(DataError, match="or batch_size=15, or pack_text=True, which cuts texts into blocks"):
        loader(texts[1])
    loader(texts[1], pack_text=True)
    memory(100)
    with pytest.raises(DataError, match=r"to which longer ones are cut$"):
        loader(texts[0])


def test_what_is_not_padded_is_not_judged(tmp_path, memory):
    memory(1)
    np.savez(tmp_path / "a.npz", inputs=np.ones((50, 30)), targets=np.arange(50) % 2)
    assert len(loader(tmp_path / "a.npz")) == 4


def test_a_cut_sample_counts_with_its_cut_length(texts):
    assert loader(texts[0])._prepared.row_bytes == 8 * LONGEST
    assert loader(texts[0], max_length=10)._prepared.row_bytes == 80


ERRORS = {
    "numpy": MemoryError("Unable to allocate 2.38 GiB for an array with shape (16, 4000)"),
    "torch": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", ERRORS)
def test_memory_that_runs_out_is_said_in_one_line(error, workers, texts, monkeypatch, capsys, tmp_path):
    def padded(self, width, fill):
        raise ERRORS[error]

    monkeypatch.setattr(Ragged, "padded", padded)
    made = loader(texts[0], num_workers=workers)
    with pytest.raises(DataError) as caught:
        list(made)
    assert str(caught.value) == (
        f"{texts[0]}: the memory does not hold a batch of 16 samples of up to 400 tokens (5.1e-05 GB and "
        "what making it takes); use a smaller batch_size, or max_length"
    )


def test_other_errors_stay_what_they_are(texts, monkeypatch):
    def padded(self, width, fill):
        raise RuntimeError("something else")

    monkeypatch.setattr(Ragged, "padded", padded)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        list(loader(texts[0]))


def test_a_limit_of_the_address_space_counts():
    limit = 6 << 30
    script = "from phase5_training.memory import usable_memory; print(usable_memory())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY)),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) <= limit
