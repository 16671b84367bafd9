"""The loader: order, seeking, workers, splits, batches, descriptions and configuration errors."""

import json
import pickle
import time
import tracemalloc

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from phase5_training.errors import DataError, UsageError
from phase5_training.pipeline.data_config import DataConfig
from phase5_training.pipeline.data_loader import DataLoaderFactory
from phase5_training.pipeline.formats import order
from phase5_training.pipeline.formats.order import EpochOrder, split_indices
from phase5_training.pipeline.formats.selection import Selection

N, WIDTH = 103, 6


def rows():
    rng = np.random.default_rng(7)
    return rng.normal(size=(N, WIDTH)).astype(np.float32), rng.integers(0, 5, N)


def write(folder, kind):
    """The same records in each format; returns the path to give to the loader."""
    x, y = rows()
    records = [{"input": a.tolist(), "target": int(b)} for a, b in zip(x, y, strict=True)]
    path = folder / f"data.{kind}"
    if kind == "json":
        path.write_text(json.dumps({"samples": records}))
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, records)))
    elif kind == "h5":
        with h5py.File(path, "w") as file:
            file["dataset/inputs"], file["dataset/targets"] = x, y
    elif kind == "pkl":
        path.write_bytes(
            pickle.dumps({"samples": [{**r, "input": a} for r, a in zip(records, x, strict=True)]})
        )
    elif kind == "pt":
        torch.save({"inputs": torch.from_numpy(x), "targets": torch.from_numpy(y)}, path)
    elif kind == "npy":
        np.save(path, x)
        np.save(folder / "data_targets.npy", y)
    elif kind == "npz":
        np.savez(path, inputs=x, targets=y)
    elif kind == "safetensors":
        from safetensors.numpy import save_file

        save_file({"inputs": x, "targets": y}, path)
    return path


FORMATS = ["json", "jsonl", "h5", "pkl", "pt", "npy", "npz", "safetensors"]


def load(path, split="train", **keywords):
    return DataLoaderFactory.create_loader(path, DataConfig(**keywords), split=split)


def same(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys() == {"input", "target", "index"}
        for key in a:
            assert type(a[key]) is type(b[key])
            named = isinstance(a[key], dict)
            pairs = (
                [(a[key][name], b[key][name]) for name in a[key] | b[key]] if named else [(a[key], b[key])]
            )
            for one, other in pairs:
                assert one.dtype == other.dtype
                assert torch.equal(one, other)


# --- every format, every mode -------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_records(tmp_path, kind, streaming):
    x, y = rows()
    loader = load(write(tmp_path, kind), batch_size=8, streaming=streaming, shuffle_buffer=16)
    batches = list(loader)
    assert [len(b["index"]) for b in batches] == [8] * 12 + [7]
    assert len(loader) == 13
    assert loader.num_samples == N
    index = torch.cat([b["index"] for b in batches])
    assert sorted(index.tolist()) == list(range(N))
    assert index.tolist() != list(range(N))
    inputs, targets = torch.cat([b["input"] for b in batches]), torch.cat([b["target"] for b in batches])
    assert inputs.dtype == torch.float32
    assert targets.dtype == torch.int64
    assert torch.equal(inputs, torch.from_numpy(x)[index])
    assert torch.equal(targets, torch.from_numpy(y)[index])
    assert loader.spec.input_kind == "features"
    assert loader.spec.input_shape == (WIDTH,)
    assert (loader.spec.target_kind, loader.spec.num_classes) == ("class", 5)
    assert loader.spec.label_range == (0, 4)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "h5"])  # that is read by chunks
def test_batches_are_the_same_whatever_the_access(tmp_path, kind):
    path = write(tmp_path, kind)
    same(load(path, batch_size=8), load(path, batch_size=8, memory_limit_mb=0))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["json", "jsonl", "h5", "npy"])
def test_workers_change_nothing(tmp_path, kind, streaming):
    path = write(tmp_path, kind)
    options = {"batch_size": 8, "streaming": streaming, "shuffle_buffer": 20, "memory_limit_mb": 0}
    alone, helped = load(path, **options), load(path, num_workers=2, **options)
    state = torch.random.get_rng_state()
    for _ in range(2):
        same(alone, helped)
    helped.set_position(1, 3)
    alone.set_position(1, 3)
    same(alone, helped)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["json", "jsonl", "h5", "npy"])
def test_seeking_gives_the_tail_of_the_epoch(tmp_path, kind, streaming):
    path = write(tmp_path, kind)
    options = {"batch_size": 8, "streaming": streaming, "shuffle_buffer": 20}
    whole = load(path, **options)
    list(whole)
    second = list(whole)
    fresh = load(path, **options)
    fresh.set_position(1, 3)
    same(fresh, second[3:])
    same(fresh, load_epoch(path, 2, options))


def load_epoch(path, epoch, options):
    loader = load(path, **options)
    loader.set_position(epoch, 0)
    return loader


def test_the_place_after_the_last_batch_is_the_next_epoch(tmp_path):
    path = write(tmp_path, "npy")
    loader = load(path, batch_size=8)
    loader.set_position(0, len(loader))
    same(loader, load_epoch(path, 1, {"batch_size": 8}))
    with pytest.raises(UsageError, match="no position epoch 0, batch 14: an epoch has 13 batches"):
        loader.set_position(0, 14)


def test_an_abandoned_epoch_does_not_disturb_the_next(tmp_path):
    path = write(tmp_path, "npy")
    for workers in (0, 2):
        loader = load(path, batch_size=8, num_workers=workers)
        next(iter(loader))
        same(loader, load_epoch(path, 1, {"batch_size": 8}))


def test_workers_stop_at_once(tmp_path):
    loader = load(write(tmp_path, "npy"), batch_size=8, num_workers=2)
    list(loader)
    next(iter(loader))
    begin = time.perf_counter()
    del loader
    assert time.perf_counter() - begin < 4  # a worker that misses its signal is waited for 5 s


def test_epochs_and_seeds_differ(tmp_path):
    path = write(tmp_path, "npy")

    def order(seed, epoch):
        loader = load(path, seed=seed)
        return torch.cat(
            [torch.from_numpy(loader.batch_indices(epoch, b)) for b in range(len(loader))]
        ).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(s, e)) for s in range(3) for e in range(3)}) == 9


# --- order ---------------------------------------------------------------------------------------


@given(
    n=st.integers(1, 60), window=st.none() | st.integers(1, 25), seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5), size=st.integers(1, 17),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_a_permutation_read_in_any_pieces(n, window, seed, epoch, size):
    order = EpochOrder(n, None, seed=seed, window=window)
    whole = order.slice(epoch, 0, n)
    assert sorted(whole.tolist()) == list(range(n))
    pieces = [order.slice(epoch, a, min(a + size, n)) for a in reversed(range(0, n, size))]
    assert np.array_equal(np.concatenate(pieces[::-1]), whole)
    if window is not None:
        assert np.abs(whole - np.arange(n)).max() < window


def test_the_order_is_the_published_generator():
    # The recorded order of one epoch: if this changes, every resumed run would go on in another order.
    keys = np.random.Philox(np.random.SeedSequence((2, 3, 4, 0))).random_raw(9)
    assert EpochOrder(9, None, seed=3).slice(4, 0, 9).tolist() == np.argsort(keys).tolist()
    assert EpochOrder(9, None, seed=3).slice(4, 0, 9).tolist() == RECORDED


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 3), max_size=200))
def test_keys_are_sorted_as_by_a_stable_sort(keys):
    wanted = sorted(range(len(keys)), key=keys.__getitem__)
    assert order.sorted_places(np.array(keys, np.uint64)).tolist() == wanted


RECORDED = [8, 5, 2, 1, 7, 6, 0, 4, 3]


@given(
    n=st.integers(2, 200),
    share=st.floats(0.05, 0.9),
    seed=st.integers(0, 99),
    gone=st.sets(st.integers(0, 99)),
)
@settings(max_examples=60, deadline=None)
def test_a_split_holds_out_the_smallest_keys(n, share, seed, gone):
    usable = np.setdiff1d(np.arange(n), sorted(gone))
    if len(usable) < 2:
        return
    held_out = max(1, min(len(usable) - 1, round(len(usable) * share)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "_PIECE", 16)
        keep = Selection.without(n, [i for i in gone if i < n])
        train, validation = split_indices(n, keep, held_out, seed)
    keys = np.random.Philox(np.random.SeedSequence((1, seed))).random_raw(n)
    smallest = sorted(usable[np.argsort(keys[usable])][:held_out].tolist())
    assert validation.positions().tolist() == smallest
    assert train.positions().tolist() == np.setdiff1d(usable, smallest).tolist()
    assert (len(train), len(validation)) == (len(usable) - held_out, held_out)


def test_a_split_and_its_order_take_bits_not_numbers_for_each_record():
    n = 1 << 20
    tracemalloc.start()
    try:
        train, validation = split_indices(n, None, n // 10, seed=0)
        found = EpochOrder(len(train), train, seed=0, window=4096, frugal=True)
        seen = [found.slice(1, at, at + 500) for at in range(0, len(train) - 500, len(train) // 50)]
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < n  # two selections of two bits; an array of positions alone would take 8 n
    assert peak < 8 * n
    assert not set(np.concatenate(seen).tolist()) & set(validation.positions().tolist())


def test_validation_split(tmp_path):
    path = write(tmp_path, "npy")
    config = DataConfig(batch_size=10, validation_split=0.2, drop_last=True)
    train, validation = DataLoaderFactory.create_loaders(path, config)
    assert (train.num_samples, validation.num_samples) == (82, 21)
    assert (len(train), len(validation)) == (8, 3)  # validation drops nothing
    held_out = torch.cat([b["index"] for b in validation])
    assert held_out.tolist() == sorted(held_out.tolist())
    for _ in range(3):
        seen = torch.cat([b["index"] for b in train])
        assert not set(seen.tolist()) & set(held_out.tolist())
    alone = DataLoaderFactory.create_loader(path, config, split="validation")
    same(alone, validation)
    same(alone, validation)


def test_a_whole_file_as_validation_is_read_in_order(tmp_path):
    loader = load(write(tmp_path, "json"), split="validation")
    assert torch.cat([b["index"] for b in loader]).tolist() == list(range(N))
    assert loader.split == "validation"


def test_drop_last(tmp_path):
    path = write(tmp_path, "npy")
    loader = load(path, batch_size=10, drop_last=True)
    assert len(loader) == 10
    assert {len(b["index"]) for b in loader} == {10}
    with pytest.raises(
        DataError, match="103 samples make no batch of 200 with drop_last; use batch_size=103"
    ):
        load(path, batch_size=200, drop_last=True)


# --- text ----------------------------------------------------------------------------------------


def write_lines(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


TEXTS = ["short", "a somewhat longer text", "ü", "x" * 40, "yes"]


@pytest.mark.parametrize("options", [{}, {"streaming": True}, {"streaming": True, "cache_size": 0}])
def test_text_classification_by_bytes(tmp_path, options):
    names = ["no", "yes", "no", "maybe", "yes"]
    records = [{"input": t, "target": n} for t, n in zip(TEXTS, names, strict=True)]
    loader = load(write_lines(tmp_path / "t.jsonl", records), batch_size=3, shuffle=False, **options)
    spec = loader.spec
    assert (spec.input_kind, spec.vocab_size, spec.class_names) == ("tokens", 256, ("maybe", "no", "yes"))
    assert (spec.num_classes, spec.input_shape) == (3, (None,))
    for epoch in range(2):
        batches = list(loader)
        assert [b["input"].shape[1] for b in batches] == [24, 40], epoch
        assert torch.cat([b["target"] for b in batches]).tolist() == [1, 2, 1, 0, 2]
        for i, row in enumerate(row for b in batches for row in b["input"]):
            raw = TEXTS[i].encode()
            assert row.tolist() == [*raw, *[0] * (len(row) - len(raw))]


def test_truncation_is_counted_and_width_stays_within_max_length(tmp_path):
    records = [{"input": t, "target": 0} for t in TEXTS]
    loader = load(write_lines(tmp_path / "t.jsonl", records), max_length=21, shuffle=False)
    (batch,) = loader
    assert batch["input"].shape == (5, 21)
    assert loader.description()["truncated"] == 2


@pytest.mark.parametrize("options", [{}, {"streaming": True}])
def test_next_token_text(tmp_path, options):
    records = [{"input": t} for t in TEXTS]
    loader = load(write_lines(tmp_path / "t.jsonl", records), shuffle=False, max_length=30, **options)
    (batch,) = loader
    assert loader.spec.task == "next_token"
    assert batch["input"].shape == batch["target"].shape == (5, 30)
    for row, wanted, text in zip(batch["input"], batch["target"], TEXTS, strict=True):
        raw = list(text.encode())[:31]
        pads = 31 - len(raw)
        assert row.tolist() == (raw + [0] * pads)[:-1]
        assert wanted.tolist() == (raw + [-100] * pads)[1:]


@pytest.mark.parametrize("options", [{}, {"streaming": True}])
def test_text_answers_are_learned_and_prompts_are_not(tmp_path, options):
    records = [{"input": "2+2=", "target": "4"}, {"input": "ab", "target": "cde"}]
    path = write_lines(tmp_path / "t.jsonl", records)
    (batch,) = load(path, shuffle=False, task="next-token", **options)
    ignored = -100
    assert batch["input"][0].tolist() == [*b"2+2=4", 0, 0, 0]
    assert batch["target"][0].tolist() == [ignored, ignored, ignored, ord("4"), *[ignored] * 4]
    assert batch["target"][1].tolist() == [ignored, *b"cde", *[ignored] * 4]


def test_a_tokenizer_file(tmp_path):
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, "[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    path = write_lines(tmp_path / "t.jsonl", [{"input": "a b b", "target": 1}, {"input": "b z", "target": 0}])
    loader = load(path, shuffle=False, tokenizer=tmp_path / "tokenizer.json")
    (batch,) = loader
    assert batch["input"][:, :4].tolist() == [[1, 2, 2, 0], [2, 0, 0, 0]]
    assert loader.spec.vocab_size == 3
    with pytest.raises(UsageError, match="is not a file"):
        load(path, tokenizer=str(tmp_path / "none.json"))


def test_cache_hit_rate(tmp_path):
    path = write(tmp_path, "jsonl")
    loader = load(path, streaming=True, cache_size=N)
    list(loader)
    assert loader.description()["cache_hit_rate"] == 0
    list(loader)
    assert loader.description()["cache_hit_rate"] == 0.5
    with_workers = load(path, streaming=True, cache_size=N, num_workers=1)
    list(with_workers)
    list(with_workers)
    assert with_workers.description()["cache_hit_rate"] == 0.5
    assert load(path).description()["cache_hit_rate"] is None


# --- targets -------------------------------------------------------------------------------------


def test_multi_task_targets(tmp_path):
    records = [{"input": [float(i), 1.0], "target": {"kind": "ab"[i % 2], "size": i / 2}} for i in range(6)]
    loader = load(write_lines(tmp_path / "t.jsonl", records), shuffle=False)
    (batch,) = loader
    assert batch["target"]["kind"].tolist() == [0, 1, 0, 1, 0, 1]
    assert batch["target"]["size"].tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    assert loader.spec.target_kind == "multi"
    assert loader.spec.task == "multi_task"
    assert loader.spec.targets["kind"].num_classes == 2
    assert loader.spec.targets["size"].kind == "float"


@pytest.mark.parametrize(
    ("target", "task", "kind", "dtype"),
    [
        (1, None, "class", torch.int64),
        (1, "regression", "float", torch.float32),
        (1.0, None, "float", torch.float32),
        (1.0, "classification", "class", torch.int64),
        ([0.5, 1.5], None, "float", torch.float32),
        (True, None, "class", torch.int64),
    ],
)
def test_kinds_of_targets(tmp_path, target, task, kind, dtype):
    records = [{"input": [0.5], "target": target} for _ in range(4)]
    loader = load(write_lines(tmp_path / "t.jsonl", records), task=task)
    (batch,) = loader
    assert loader.spec.target_kind == kind
    assert batch["target"].dtype == dtype
    assert batch["target"].shape == (4, *np.shape(target))


def test_per_position_targets_and_token_inputs(tmp_path):
    records = [{"input": [3, 4, 5], "target": [0, 1, 9]} for _ in range(4)]
    loader = load(write_lines(tmp_path / "t.jsonl", records))
    assert (loader.spec.target_kind, loader.spec.num_classes, loader.spec.vocab_size) == ("tokens", 10, 6)
    assert next(iter(loader))["target"].dtype == torch.int64


def test_lists_of_different_lengths_need_a_padding_token(tmp_path):
    path = write_lines(tmp_path / "t.jsonl", [{"input": [3, 4, 5], "target": 0}, {"input": [7], "target": 1}])
    with pytest.raises(DataError, match=r"t\.jsonl record 1 has input of shape \(1,\).*set pad_id"):
        load(path)
    for options in ({}, {"streaming": True}):
        (batch,) = load(path, pad_id=9, shuffle=False, **options)
        assert batch["input"].tolist() == [[3, 4, 5, 9, 9, 9, 9, 9], [7, 9, 9, 9, 9, 9, 9, 9]]


def test_images_of_bytes_become_float_features(tmp_path):
    images = np.arange(4 * 9, dtype=np.uint8).reshape(4, 3, 3)
    np.savez(tmp_path / "i.npz", x=images, y=np.arange(4))
    loader = load(tmp_path / "i.npz", shuffle=False)
    (batch,) = loader
    assert batch["input"].dtype == torch.float32
    assert torch.equal(batch["input"], torch.from_numpy(images).float())


# --- quality and bad records ----------------------------------------------------------------------


def test_quality_threshold_and_quarantine(tmp_path):
    records = [{"input": [1.0], "target": 0, "metadata": {"quality": q}} for q in (0.9, 0.5, 0.8, 0.1)]
    records.append({"input": [1.0], "target": 1})
    path = write_lines(tmp_path / "t.jsonl", records)
    seen = []
    for options in ({}, {"streaming": True}):
        seen.clear()
        loader = DataLoaderFactory.create_loader(
            path,
            DataConfig(quality_threshold=0.8, max_dropped_share=0.5, **options),
            quarantine=seen.append,
        )
        assert sorted(torch.cat([b["index"] for b in loader]).tolist()) == [0, 2, 4]
        assert seen == [
            {"file": str(path), "index": 1, "reason": "quality", "detail": "has quality 0.5, below 0.8"},
            {"file": str(path), "index": 3, "reason": "quality", "detail": "has quality 0.1, below 0.8"},
        ]
        assert loader.description()["dropped"] == {"quality": 2}
        assert loader.description()["without_quality"] == 1
    with pytest.raises(DataError, match=r"u\.jsonl: all 4 records were dropped \(quality 4\)"):
        load(write_lines(tmp_path / "u.jsonl", records[:4]), quality_threshold=2.0)


def test_bad_records_fail_or_are_dropped(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"input": [1.0, 2.0], "target": 0}\n'
        '{"input": [1.0, 1e60], "target": 0}\n'
        '{"input": [1.0], "target": 0}\n'
        '{"input": [1.0, null], "target": 0}\n'
        '{"input": [1.0, NaN], "target": 0}\n'
        '{"input": "text", "target": 0}\n'
        '{"input": [1.0, 2.0], "target": "a"}\n'
        '{"input": [1.0, 2.0], "target": -3}\n'
        '{"input": [1.0, 3.0], "target": 2}\n'
    )
    with pytest.raises(DataError):
        load(path)
    for options in ({}, {"streaming": True}, {"streaming": True, "cache_size": 0}):
        seen = []
        loader = DataLoaderFactory.create_loader(
            path,
            DataConfig(invalid_records="drop", max_dropped_share=0.8, shuffle=False, **options),
            quarantine=seen.append,
        )
        (batch,) = loader
        assert batch["index"].tolist() == [0, 8]
        assert batch["input"].tolist() == [[1, 2], [1, 3]]
        assert sorted(r["index"] for r in seen) == list(range(1, 8))
        assert loader.description()["dropped"] == {"unreadable": 4, "nonfinite": 1, "shape": 1, "label": 1}


def test_text_stays_aligned_after_drops(tmp_path):
    records = [{"input": "a" * i, "target": i % 3, "metadata": {"quality": i % 2}} for i in range(1, 30)]
    path = write_lines(tmp_path / "t.jsonl", records)
    for batch in load(path, quality_threshold=0.5, max_dropped_share=0.5, batch_size=4):
        assert ((batch["input"] != 0).sum(1) == batch["index"] + 1).all()
        assert (batch["target"] == (batch["index"] + 1) % 3).all()
        assert (batch["index"] % 2 == 0).all()


# --- Datasets and batches --------------------------------------------------------------------------


class Pairs(Dataset):
    def __init__(self, form):
        self.form = form

    def __len__(self):
        return 20

    def __getitem__(self, i):
        x, y = torch.full((3,), float(i)), i % 4
        return {"pair": (x, y), "dict": {"input": x, "target": y}, "hf": {"x": [float(i)] * 3, "labels": y}}[
            self.form
        ]


class Batched(Pairs):
    def __getitems__(self, indices):
        return [self[i] for i in indices]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "source",
    [Pairs("pair"), Pairs("dict"), Pairs("hf"), Batched("pair")],
    ids=["pair", "dict", "hf", "batched"],
)
def test_map_style_datasets(source, workers):
    loader = load(source, batch_size=6, num_workers=workers)
    index = []
    for batch in loader:
        assert torch.equal(batch["input"], batch["index"].float()[:, None].expand(-1, 3))
        assert torch.equal(batch["target"], batch["index"] % 4)
        index += batch["index"].tolist()
    assert sorted(index) == list(range(20))
    assert loader.spec.num_classes == 4


@pytest.mark.parametrize("place", [0, 19])
def test_a_dataset_item_with_nan_is_named(place):
    class Broken(Pairs):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return (x * float("nan") if i == place else x), y

    with pytest.raises(DataError, match=f"Broken record {place} has NaN or infinity"):
        load(Broken("pair"))


def test_tensor_dataset_is_gathered_by_arrays():
    data = TensorDataset(torch.rand(50, 3), torch.arange(50))
    for batch in load(data, batch_size=7):
        assert torch.equal(batch["input"], data.tensors[0][batch["index"]])
        assert torch.equal(batch["target"], data.tensors[1][batch["index"]])
    with pytest.raises(UsageError, match="has 3 tensors"):
        load(TensorDataset(*[torch.rand(4)] * 3))


def test_lists_of_batches_and_loaders():
    data = TensorDataset(torch.rand(10, 3), torch.arange(10))
    batches = list(DataLoader(data, batch_size=4))
    for source in (batches, DataLoader(data, batch_size=4), lambda: iter(batches)):
        loader = load(source)
        for _ in range(2):
            got = list(loader)
            assert torch.equal(torch.cat([b["input"] for b in got]), data.tensors[0])
            assert torch.cat([b["index"] for b in got]).tolist() == list(range(10))
        assert loader.num_samples == 10
    assert len(load(batches)) == 3
    assert load(batches).spec.num_classes == 10
    loader = load(batches)
    loader.set_position(0, 2)
    assert torch.equal(next(iter(loader))["input"], batches[2][0])


def test_a_generator_is_good_for_one_epoch():
    loader = load({"input": torch.ones(2, 3), "target": torch.zeros(2)} for _ in range(3))
    with pytest.raises(TypeError):
        len(loader)
    assert len(list(loader)) == 3
    with pytest.raises(DataError, match=r"can be read once.*pass a list"):
        iter(loader).__next__()
    with pytest.raises(DataError, match="has no epoch 1"):
        load(b for b in [(torch.ones(2, 1), torch.ones(2))]).set_position(1, 0)


def test_iterable_dataset():
    class Count(IterableDataset):
        def __iter__(self):
            return iter([(torch.tensor([float(i)]), i) for i in range(5)])

    loader = load(Count(), batch_size=2)
    assert [b["target"].tolist() for b in loader] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "holds no batches|list of data files is empty"),
        ([1, 2], "batch 0 is int; wanted"),
        ([{"input": torch.ones(2)}], "batch 0 has no 'target'"),
        ([(torch.ones(2), torch.ones(3))], r"batch 0: inputs and targets have \[2, 3\] rows"),
        (TensorDataset(torch.ones(0, 2)), "inputs is empty"),
    ],
)
def test_bad_batches(source, message):
    with pytest.raises(DataError, match=message):
        load(source)


def test_what_is_no_data():
    with pytest.raises(UsageError, match="cannot read data from int"):
        load(3)
    with pytest.raises(UsageError, match="cannot divide ready batches"):
        load([(torch.ones(2, 1), torch.ones(2))], validation_split=0.5)


# --- the validation file of a run -------------------------------------------------------------------


def test_a_validation_file_takes_the_classes_of_the_training_file(tmp_path):
    train = load(write_lines(tmp_path / "a.jsonl", [{"input": "x", "target": t} for t in "abc"]))
    path = write_lines(tmp_path / "b.jsonl", [{"input": "y", "target": t} for t in "cb"])
    loader = DataLoaderFactory.create_loader(path, split="validation", spec=train.spec)
    assert next(iter(loader))["target"].tolist() == [2, 1]
    bad = write_lines(tmp_path / "c.jsonl", [{"input": "y", "target": t} for t in "cz"])
    with pytest.raises(DataError, match=r"c\.jsonl record 1 has label 'z', which training data lack"):
        DataLoaderFactory.create_loader(bad, spec=train.spec)
    other = write_lines(tmp_path / "d.jsonl", [{"input": [1.0], "target": "a"}])
    with pytest.raises(
        DataError, match=r"inputs are features of shape \(1,\), the training data's are tokens"
    ):
        DataLoaderFactory.create_loader(other, spec=train.spec)


# --- configuration -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 is not a whole number of at least 1"),
        ({"batch_size": 2.5}, "batch_size=2.5 is not a whole number"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"validation_split": 1.0}, r"validation_split=1.0 is not in \[0, 1\)"),
        ({"quality_threshold": float("nan")}, "quality_threshold=nan"),
        ({"invalid_records": "ignore"}, "invalid_records='ignore' is unknown"),
        ({"task": "clasification"}, "did you mean 'classification'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UsageError, match=message):
        DataConfig(**options)


def test_splits_that_leave_nothing(tmp_path):
    path = write_lines(tmp_path / "t.jsonl", [{"input": [1.0], "target": 0}] * 3)
    with pytest.raises(DataError, match="leaves 3 for training and 0 for validation"):
        load(path, validation_split=0.1)
    with pytest.raises(UsageError, match="split='test'"):
        load(path, split="test")


@pytest.mark.parametrize(
    ("records", "task", "message"),
    [
        ([{"input": [1.5]}], None, "have no targets and their inputs are not sequences"),
        ([{"input": [1.5]}], "classification", "needs targets"),
        ([{"input": [1.5], "target": "a"}], "regression", "targets are text"),
        ([{"input": [1.5], "target": [1.5]}], "classification", "one label each"),
        ([{"input": [1.5], "target": 0.5}], "classification", "not a whole-numbered class"),
        ([{"input": [1, 2], "target": 1}], "next_token", "takes no targets"),
        ([{"input": [1]}], None, "leave nothing to predict"),
    ],
)
def test_tasks_that_do_not_fit_the_data(tmp_path, records, task, message):
    with pytest.raises(DataError, match=message):
        load(write_lines(tmp_path / "t.jsonl", records), task=task)


def test_free_text_targets_are_not_taken_for_labels(tmp_path):
    records = [{"input": "q", "target": f"answer {i}"} for i in range(1500)]
    with pytest.raises(DataError, match="1500 different target texts in 1500 records"):
        load(write_lines(tmp_path / "t.jsonl", records))


def test_description_is_json(tmp_path):
    loader = load(write(tmp_path, "h5"), batch_size=8, validation_split=0.1)
    text = json.loads(json.dumps(loader.description()))
    assert text["format"] == "hdf5"
    assert text["mode"] == "in memory"
    assert (text["records"], text["samples"]) == (N, 93)
    assert text["input_shape"] == [WIDTH]
    assert text["input_dtype"] == "float32"
    assert text["target_kind"] == "class"
    assert text["num_classes"] == 5
    json.dumps(loader.spec.to_dict())


def test_a_batch_in_memory_costs_little():
    data = TensorDataset(torch.rand(20000, 16), torch.randint(0, 10, (20000,)))
    loader = load(data, batch_size=512)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        list(loader)
        times.append((time.perf_counter() - begin) / len(loader))
    # Measured near 60 us; the bound leaves room for a busy machine and none for per-sample work.
    assert min(times) < 1e-3


# --- ranks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_ranks_divide_each_batch_and_change_no_order(tmp_path, workers, streaming):
    path = write(tmp_path, "npy")
    options = {"batch_size": 16, "streaming": streaming, "shuffle_buffer": 20}
    alone = load(path, **options)
    ranks = [load(path, rank=r, world_size=3, num_workers=workers, **options) for r in range(3)]
    for loader in (alone, *ranks):
        loader.set_position(1, 2)
    assert [len(loader) for loader in ranks] == [7] * 3
    parts = [list(loader) for loader in ranks]
    for batch, *own in zip(alone, *parts, strict=True):
        sizes = [len(part["index"]) for part in own]
        assert max(sizes) - min(sizes) <= 1
        for key in batch:
            assert torch.equal(torch.cat([part[key] for part in own]), batch[key])


def test_a_last_batch_too_small_for_the_ranks(tmp_path):
    path = write(tmp_path, "npy")  # 103 = 10 * 10 + 3
    with pytest.raises(DataError, match="has 3 of 103 samples, fewer than one for each of 4 ranks"):
        load(path, batch_size=10, world_size=4)
    assert len(load(path, batch_size=10, world_size=4, drop_last=True)) == 10
    loaders = [load(path, "validation", batch_size=10, rank=r, world_size=4) for r in range(4)]
    seen = [torch.cat([batch["index"] for batch in loader]).tolist() for loader in loaders]
    assert sorted(i for part in seen for i in part) == list(range(N))
    assert {len(list(loader)) for loader in loaders} == {10}  # the three are in the tenth batch
    with pytest.raises(DataError, match="has 103 of 103 samples"):
        load(path, "validation", batch_size=200, world_size=150)


def test_ranks_of_ready_batches():
    batches = [(torch.arange(5), torch.arange(5)), (torch.arange(2), torch.arange(2))]
    loaders = [DataLoaderFactory.create_loader(batches, DataConfig(rank=r, world_size=2)) for r in range(2)]
    first = [next(iter(loader))["index"].tolist() for loader in loaders]
    assert first == [[0, 1], [2, 3, 4]]
    with pytest.raises(DataError, match="batch 1 has 2 samples for 3 ranks"):
        list(DataLoaderFactory.create_loader(batches, DataConfig(world_size=3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank=2 of world_size=2; ranks count from 0"),
        ({"batch_size": 2, "world_size": 3}, "batch_size=2 is fewer than one sample for each of 3 ranks"),
    ],
)
def test_ranks_that_cannot_be(options, message):
    with pytest.raises(UsageError, match=message):
        DataConfig(**options)


# --- files read in blocks --------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), window=st.integers(1, 30),
    epoch=st.integers(0, 3), size=st.integers(1, 9), dropped=st.sets(st.integers(0, 40), max_size=9),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_an_order_by_blocks_is_a_permutation_that_stays_near_its_blocks(sizes, window, epoch, size, dropped):
    records = sum(sizes)
    starts = np.cumsum([0, *sizes[:-1]])
    kept = np.setdiff1d(np.arange(records), sorted(dropped))
    if not len(kept):
        return
    chosen = Selection.without(records, np.setdiff1d(np.arange(records), kept))
    order = EpochOrder(len(kept), chosen, seed=5, window=window, blocks=starts)
    whole = order.slice(epoch, 0, len(kept))
    frugal = EpochOrder(len(kept), chosen, seed=5, window=window, blocks=starts, frugal=True)
    assert np.array_equal(frugal.slice(epoch, 0, len(kept)), whole)
    assert sorted(whole.tolist()) == kept.tolist()
    pieces = [order.slice(epoch, a, min(a + size, len(kept))) for a in reversed(range(0, len(kept), size))]
    assert np.array_equal(np.concatenate(pieces[::-1]), whole)
    # A block's samples lie in windows next to each other: as many as its length needs, and one more.
    owner = np.searchsorted(starts, whole, side="right") - 1
    for block in np.unique(owner):
        windows = np.unique(np.flatnonzero(owner == block) // window)
        length = (owner == block).sum()
        assert windows[-1] - windows[0] <= -(-length // window)


def chunked(path, n=400, chunk=10, **options):
    x = np.arange(n * 3, dtype=np.float32).reshape(n, 3)
    with h5py.File(path, "w") as file:
        file.create_dataset("dataset/inputs", data=x, chunks=(chunk, 3), **options)
        file.create_dataset("dataset/targets", data=np.arange(n), chunks=(chunk,), **options)
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_hdf5_in_place_is_shuffled_by_chunks_and_each_is_read_once(tmp_path, workers, monkeypatch):
    from phase5_training.pipeline.formats import hdf5

    path = chunked(tmp_path / "a.h5", compression="gzip")
    options = {"batch_size": 8, "memory_limit_mb": 0, "shuffle_buffer": 80, "num_workers": workers}
    loader = load(path, **options)
    reads = []
    original = hdf5.Hdf5Source._read

    def counting(source, data, begins, ends):
        reads.extend(zip(begins, ends, strict=True))
        return original(source, data, begins, ends)

    monkeypatch.setattr(hdf5.Hdf5Source, "_read", counting)
    orders = []
    for epoch in range(2):
        batches = list(loader)
        index = torch.cat([b["index"] for b in batches])
        assert sorted(index.tolist()) == list(range(400))
        assert torch.equal(torch.cat([b["input"] for b in batches])[:, 0], 3.0 * index)
        assert torch.equal(torch.cat([b["target"] for b in batches]), index)
        orders.append(index)
        if not workers:
            # 40 chunks of two columns; windows of 160 of 400 samples, so none lies in two.
            assert len(reads) == (epoch + 1) * 80
    assert not torch.equal(*orders)
    distance = (orders[0][1:] - orders[0][:-1]).abs().float().mean()
    assert distance > 400 / 6  # far from the order of the file, in which it is 1
    loader.set_position(1, 7)
    same(loader, load_from(path, 1, 7, options))
    assert torch.equal(torch.cat([b["index"] for b in load_from(path, 1, 7, options)]), orders[1][56:])


def load_from(path, epoch, batch, options):
    loader = load(path, **options)
    loader.set_position(epoch, batch)
    return loader


def test_blocks_of_large_records_do_not_fill_memory(tmp_path):
    from phase5_training.pipeline import data_loader

    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "inputs", shape=(600, 512, 512), dtype="u1", chunks=(1, 512, 512), compression="gzip"
        )
        file["inputs"][:] = 1
        file["targets"] = np.arange(600) % 3
    loader = load(path, batch_size=4, streaming=True)
    assert loader._order.window * 512 * 512 * 4 <= data_loader.WINDOW_BYTES + 4 * 512 * 512 * 4


@pytest.mark.parametrize("kind", ["json", "npy", "text"])
def test_batches_read_together_are_those_read_alone(tmp_path, kind, monkeypatch):
    from phase5_training.pipeline import data_loader

    if kind == "text":
        path = write_lines(tmp_path / "t.jsonl", [{"input": "ab" * i, "target": i % 2} for i in range(1, N)])
    else:
        path = write(tmp_path, kind)
    together = list(load(path, batch_size=4, memory_limit_mb=0))
    monkeypatch.setattr(data_loader, "MAX_TOGETHER", 1)
    same(load(path, batch_size=4, memory_limit_mb=0), together)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("npz", {}),
        ("json", {"drop_last": True}),
        ("text", {}),
        ("text", {"bucket_by_length": True}),
        ("npz", {"validation_split": 0.25, "rank": 1, "world_size": 3}),
    ],
)
def test_batches_of_the_next_epochs_that_were_read_before_are_those_read_alone(
    tmp_path, kind, options, monkeypatch
):
    from phase5_training.pipeline import data_loader

    if kind == "text":
        path = write_lines(tmp_path / "t.jsonl", [{"input": "ab" * i, "target": i % 2} for i in range(1, N)])
    else:
        path = write(tmp_path, kind)
    ahead = load(path, batch_size=8, **options)
    monkeypatch.setattr(data_loader, "MAX_TOGETHER", 1)
    alone = load(path, batch_size=8, **options)
    assert ahead._together > len(ahead) > 2
    for _ in range(4):
        same(ahead, alone)
    next(iter(ahead))  # an epoch that is left
    for epoch, batch in ((5, 0), (5, 2), (1, 3), (1, 3), (6, len(ahead) - 1)):
        ahead.set_position(epoch, batch)
        alone.set_position(epoch, batch)
        same(ahead, alone)
        same(ahead, alone)
    for mine, other in zip(zip(ahead, ahead, strict=True), zip(alone, alone, strict=True), strict=True):
        same(mine, other)  # two epochs at the same time


def test_epochs_of_few_batches_in_memory_are_read_together(tmp_path, monkeypatch):
    loader = load(write(tmp_path, "npz"), batch_size=8)
    reads = []
    batches = loader._prepared.batches
    monkeypatch.setattr(
        loader._prepared, "batches", lambda portion: reads.append(len(portion.sizes)) or batches(portion)
    )
    for _ in range(10):
        list(loader)
    assert reads == [1, loader._together]
    assert loader._together >= 10 * len(loader)


# --- text without padding --------------------------------------------------------------------------


def texts(n, seed=0):
    lengths = np.random.default_rng(seed).geometric(0.03, n)
    return [(f"{i} " * 400)[:length] for i, length in enumerate(lengths)]


@pytest.mark.parametrize("options", [{}, {"streaming": True, "cache_size": 0}, {"num_workers": 2}])
def test_packed_texts_are_the_joined_texts_cut(tmp_path, options):
    found = texts(60)
    path = write_lines(tmp_path / "t.jsonl", [{"input": t} for t in found])
    loader = load(path, pack_text=True, max_length=50, batch_size=4, shuffle=False, **options)
    joined = np.frombuffer(b"".join(t.encode() + b"\0" for t in found), np.uint8)
    blocks = (len(joined) - 1) // 50
    assert loader.num_samples == blocks
    assert (loader.spec.input_shape, loader.spec.ragged) == ((50,), False)
    for _ in range(2):
        batches = list(loader)
        inputs = torch.cat([b["input"] for b in batches]).flatten()
        targets = torch.cat([b["target"] for b in batches]).flatten()
        assert inputs.tolist() == joined[: blocks * 50].tolist()
        assert targets.tolist() == joined[1 : blocks * 50 + 1].tolist()
    described = loader.description()["source"]
    assert described["tokens_unused"] == len(joined) - 1 - blocks * 50
    assert described["texts"] == 60


def test_packing_leaves_out_what_was_dropped_and_takes_the_tokenizers_separator(tmp_path):
    import tokenizers

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "</s>": 3}, "[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    records = [
        {"input": "a b", "quality": 1.0},
        {"input": "b b b", "quality": 0.1},
        {"input": "b a a", "quality": 1.0},
    ]
    loader = load(
        write_lines(tmp_path / "t.jsonl", records), pack_text=True, max_length=3, quality_threshold=0.5,
        shuffle=False, tokenizer=tmp_path / "tokenizer.json", max_dropped_share=0.5,
    )  # fmt: skip
    assert torch.cat([b["input"] for b in loader]).tolist() == [[1, 2, 3], [2, 1, 1]]


def test_what_cannot_be_packed(tmp_path):
    path = write_lines(tmp_path / "t.jsonl", [{"input": "ab", "target": 1}] * 4)
    with pytest.raises(UsageError, match=r"pack_text .* these data are for classification with targets"):
        load(path, pack_text=True)
    path = write_lines(tmp_path / "u.jsonl", [{"input": "ab"}] * 4)
    with pytest.raises(DataError, match="the texts have 12 tokens together, fewer than one block of 257"):
        load(path, pack_text=True)


@pytest.mark.parametrize("options", [{}, {"streaming": True}, {"num_workers": 2}, {"world_size": 2}])
def test_buckets_of_like_length_hold_every_sample_once_and_less_padding(tmp_path, options):
    records = [{"input": t, "target": i % 2} for i, t in enumerate(texts(500))]
    path = write_lines(tmp_path / "t.jsonl", records)
    common = {"batch_size": 8, **options}
    plain, bucketed = load(path, **common), load(path, bucket_by_length=True, **common)
    epochs = []
    for _ in range(2):
        batches = list(bucketed)
        epochs.append([i for b in batches for i in b["index"].tolist()])
        if "world_size" not in options:
            assert sorted(epochs[-1]) == list(range(500))
            assert [len(b["index"]) for b in batches] == [8] * 62 + [4]
        used = sum(len(records[i]["input"]) for i in epochs[-1])
        assert used / sum(b["input"].numel() for b in batches) > 0.8
    assert epochs[0] != epochs[1]
    share = np.mean([len(records[i]["input"]) for b in plain for i in b["index"].tolist()])
    assert share / np.mean([b["input"].shape[1] for b in plain]) < 0.6
    again = load(path, bucket_by_length=True, **common)
    again.set_position(1, 11)
    rest = [i for b in again for i in b["index"].tolist()]
    assert rest == epochs[1][-len(rest) :]


# --- other places ----------------------------------------------------------------------------------


def test_arrays_of_an_hdf5_file_by_name(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["run/3/images"] = np.arange(12.0).reshape(6, 2)
        file["run/3/labels"] = np.arange(6) % 3
        file["many/a"], file["many/b"] = np.arange(6), np.arange(6) / 2
        file["out"] = h5py.ExternalLink("b.h5", "/x")
    for options in ({}, {"memory_limit_mb": 0}):
        loader = load(tmp_path / "a.h5", inputs_path="run/3/images", targets_path="/run/3/labels", **options)
        batch = next(iter(loader))
        assert torch.equal(batch["input"][:, 0], 2.0 * batch["index"])
        assert torch.equal(batch["target"], batch["index"] % 3)
        loader = load(tmp_path / "a.h5", inputs_path="/run/3/images", targets_path="many", **options)
        assert sorted(loader.spec.targets) == ["a", "b"]
    for where, message in (
        ("none/there", r"holds no 'none/there'; it holds \['many'"),
        ("out", "external link"),
    ):
        with pytest.raises(DataError, match=message):
            load(tmp_path / "a.h5", inputs_path=where)
        with pytest.raises(DataError, match=message):
            load(tmp_path / "a.h5", inputs_path="run/3/images", targets_path=where)


def test_other_targets_for_the_usual_inputs(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["dataset/inputs"], file["dataset/targets"] = np.arange(12.0).reshape(6, 2), np.zeros(6, int)
        file["dataset/quality"], file["coarse"] = np.arange(6) / 6, np.arange(6) % 3
    loader = load(tmp_path / "a.h5", targets_path="coarse", quality_threshold=0.3, max_dropped_share=0.5)
    batch = next(iter(loader))
    assert torch.equal(batch["target"], batch["index"] % 3)
    assert loader.num_samples == 4


@pytest.mark.parametrize("name", ["inputs_path", "targets_path"])
def test_a_path_within_a_file_that_has_none(tmp_path, name):
    path = write(tmp_path, "jsonl")
    for data in (path, [(torch.ones(2, 3), torch.ones(2))]):
        with pytest.raises(
            UsageError, match=rf"{name}='x' names an array of an HDF5 file, and .* leave it out"
        ):
            DataLoaderFactory.create_loaders(data, DataConfig(**{name: "x"}))
    # Validation data may be of another format than the training data.
    DataLoaderFactory.create_loader(path, DataConfig(**{name: "x"}), split="validation")


def test_what_loads_as_a_whole_is_in_memory_also_when_streamed(tmp_path):
    np.savez(tmp_path / "a.npz", inputs=np.ones((4, 2)), targets=np.arange(4))
    assert "in memory" in load(tmp_path / "a.npz", streaming=True).sentence()


# --- the cache --------------------------------------------------------------------------------------


def test_a_cache_that_cannot_hold_the_data_is_left_out(tmp_path):
    path = write(tmp_path, "jsonl")
    loader = load(path, streaming=True, cache_size=N - 1)
    assert loader.description()["cache_size"] == 0
    assert loader.description()["cache_hit_rate"] is None


def test_a_cache_keeps_within_its_bytes(tmp_path):
    records = [{"input": "x" * 50_000, "target": i % 2} for i in range(40)]
    path = write_lines(tmp_path / "t.jsonl", records)
    loader = load(path, streaming=True, cache_mb=1, shuffle=False)
    for _ in range(2):
        assert sum(len(b["index"]) for b in loader) == 40
        kept = loader._prepared._cache._kept
        assert 0 < len(kept) * 50_000 <= 1 << 20
    assert loader.description()["cache_hit_rate"] < 0.5


@pytest.mark.parametrize("kind", ["features", "multi", "next", "dropped", "images"])
@pytest.mark.parametrize("workers", [0, 2])
def test_small_data_in_the_form_of_batches_give_the_batches_of_large_ones(
    tmp_path, kind, workers, monkeypatch
):
    from phase5_training.pipeline import data_prepared

    rng, options = np.random.default_rng(3), {"batch_size": 7, "num_workers": workers}
    if kind == "features":
        path = write(tmp_path, "json")
    elif kind == "multi":
        records = [{"input": [i, i + 1], "target": {"a": i % 3, "b": i / 2}} for i in range(40)]
        path = write_lines(tmp_path / "a.jsonl", records)
    elif kind == "next":
        (tmp_path / "a.txt").write_bytes(rng.bytes(500))
        path, options["max_length"] = tmp_path / "a.txt", 11
    elif kind == "dropped":
        qualities = rng.random(60).round(3).tolist()
        records = [{"input": [q], "target": 1.5 * q, "metadata": {"quality": q}} for q in qualities]
        path = write_lines(tmp_path / "a.jsonl", records)
        options |= {"quality_threshold": 0.3, "max_dropped_share": 0.9, "validation_split": 0.25}
    else:
        path = tmp_path / "a.npz"
        np.savez(path, x=rng.integers(0, 256, (30, 4, 4), np.uint8), y=np.arange(30, dtype=np.int32))
    small = load(path, **options)
    monkeypatch.setattr(data_prepared, "HELD_BYTES", 0)
    large = load(path, **options)
    assert small._prepared._held is not None
    assert large._prepared._held is None
    for _ in range(3):
        same(small, large)


def test_a_batch_that_was_changed_does_not_come_back(tmp_path):
    loader = load(write(tmp_path, "npz"), batch_size=8)
    list(loader)
    for batch in loader:  # of the next epoch, which was read together with others
        batch["input"].zero_()
        batch["index"].zero_()
    loader.set_position(1, 0)
    same(loader, load_epoch(tmp_path / "data.npz", 1, {"batch_size": 8}))
