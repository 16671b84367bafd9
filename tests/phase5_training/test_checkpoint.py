import hashlib
import json
import os
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from phase5_training.checkpoint import (
    CheckpointError,
    CheckpointStore,
    NotSavedError,
    load_checkpoint,
    save_checkpoint,
    take_snapshot,
    write_snapshot,
)
from phase5_training.random_state import random_state, set_random_state


def example_state():
    shared = torch.randn(3)
    return {
        "model": {"a.weight": torch.randn(2, 3).to(torch.bfloat16), "b": shared, "tied": shared},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}, 1: {}},
            "groups": [{"lr": 1e-3, "betas": (0.9, 0.98)}],
        },
        "empty": torch.zeros(0, 4),
        "codes": torch.tensor([[1, -1]], dtype=torch.int8),
        "array": np.arange(3, dtype=np.uint32),
        "figures": [1, 2.5, None, True, "text", float("inf")],
        "__odd__": {"__tuple__": 1},
    }


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_round_trip_keeps_structure_types_and_bits(tmp_path):
    state = example_state()
    folder = save_checkpoint(tmp_path / "c", state, step=3)
    assert_same(state, load_checkpoint(folder))
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "state.json", "tensors.safetensors"]


def test_random_generators_continue_where_they_were(tmp_path):
    folder = save_checkpoint(tmp_path / "c", random_state(), step=0)
    expected = (random.random(), np.random.rand(), torch.rand(3))
    set_random_state(load_checkpoint(folder))
    found = (random.random(), np.random.rand(), torch.rand(3))
    assert found[:2] == expected[:2]
    assert torch.equal(found[2], expected[2])


def test_unsavable_state_names_its_place_and_writes_nothing(tmp_path):
    with pytest.raises(TypeError, match=r"state\.loss\.0 is a function"):
        save_checkpoint(tmp_path / "c", {"loss": [lambda: 0]}, step=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found(tmp_path, name, damage):
    folder = save_checkpoint(tmp_path / "c", example_state(), step=0)
    content = bytearray((folder / name).read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    if damage == "remove":
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}.* (hash|missing)"):
        load_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format": 1, "files": 3}'])
def test_unreadable_manifest_is_refused(tmp_path, content):
    folder = save_checkpoint(tmp_path / "c", {"a": 1}, step=0)
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="manifest"):
        load_checkpoint(folder)


def test_another_format_is_refused(tmp_path):
    folder = save_checkpoint(tmp_path / "c", {"a": 1}, step=0)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        load_checkpoint(folder)


def test_store_prunes_and_falls_back_to_the_newest_that_verifies(tmp_path):
    store = CheckpointStore(folder=tmp_path / "checkpoints", keep=2)
    for step in (10, 20, 100):
        store.save({"step": step}, step)
    assert [p.name for p in store.paths()] == ["step-00000020", "step-00000100"]
    (store.path(100) / "state.json").write_bytes(b"{}")
    refused = []
    path, state = store.load_newest(refused.append)
    assert (path.name, state) == ("step-00000020", {"step": 20})
    assert "step-00000100/state.json" in refused[0]
    assert refused[0].endswith("; renamed to damaged-step-00000100")


def test_a_damaged_checkpoint_does_not_count_among_those_kept(tmp_path):
    store = CheckpointStore(folder=tmp_path, keep=2)
    for step in (10, 20):
        store.save({"step": step}, step)
    (store.path(20) / "state.json").write_bytes(b"{}")
    store.load_newest()
    store.save({"step": 15}, 15)
    assert [p.name for p in store.paths()] == ["step-00000010", "step-00000015"]
    assert (tmp_path / "damaged-step-00000020").is_dir()
    for time in (2, 3):
        store.save({"step": 20}, 20)
        (store.path(20) / "state.json").write_bytes(b"{}")
        assert store.load_newest()[1] == {"step": 15}
        assert (tmp_path / f"damaged-step-00000020-{time}").is_dir()


def test_when_all_are_damaged_they_stay_where_they_are(tmp_path):
    store = CheckpointStore(folder=tmp_path)
    store.save({"step": 1}, 1)
    (store.path(1) / "state.json").write_bytes(b"{}")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no checkpoint that can be read"):
            store.load_newest()
    assert store.path(1).is_dir()


def test_a_file_with_a_checkpoints_name_is_none(tmp_path):
    store = CheckpointStore(folder=tmp_path)
    (tmp_path / "step-00000001").write_text("")
    for step in (2, 3, 4):
        store.save({}, step)
    assert [p.name for p in store.paths()] == ["step-00000003", "step-00000004"]


def test_a_killed_save_leaves_no_checkpoint_and_is_swept(tmp_path, monkeypatch):
    import phase5_training.checkpoint as module

    store = CheckpointStore(folder=tmp_path)
    (tmp_path / ".step-00000005.1.new.tmp").mkdir()
    monkeypatch.setattr(module, "write_file", lambda path, parts: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        store.save({"a": 1}, 7)
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="no checkpoint"):
        store.load_newest()


def test_saving_the_same_step_again_replaces_it(tmp_path):
    store = CheckpointStore(folder=tmp_path)
    store.save({"a": 1}, 7)
    store.save({"a": 2}, 7)
    assert store.load_newest()[1] == {"a": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]


def test_arrays_that_are_not_contiguous_keep_their_own_values(tmp_path):
    """Each needs a copy, and a freed copy's memory is given to the next."""
    state = {name: np.arange(start, start + 10)[::2] for start, name in enumerate("abcdef")}
    folder = save_checkpoint(tmp_path / "c", state, step=0)
    assert_same(state, load_checkpoint(folder))


def test_a_replacement_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    store = CheckpointStore(folder=tmp_path)
    store.save({"v": 1}, 7)
    rename, calls = os.rename, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr("phase4_bitnet.durable_folder.os.rename", second_fails)
    with pytest.raises(OSError, match="No space"):
        store.save({"v": 2}, 7)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]
    assert store.load_newest()[1] == {"v": 1}


@pytest.mark.parametrize("found_by", ["paths", "save"])
def test_a_checkpoint_left_aside_by_a_killed_replacement_is_recovered(tmp_path, found_by):
    store = CheckpointStore(folder=tmp_path)
    store.save({"v": 1}, 7)
    store.path(7).rename(tmp_path / ".step-00000007.123.old.tmp")
    (tmp_path / ".step-00000007.123.new.tmp").mkdir()
    if found_by == "save":
        save_checkpoint(store.path(8), {"v": 2}, step=8)
    assert store.path(7) in store.paths()
    assert load_checkpoint(store.path(7)) == {"v": 1}


def test_every_type_of_tensor_comes_back(tmp_path):
    import phase5_training.tensor_files as module

    state = {}
    for dtype in module.DTYPES:
        for shape in ((), (0, 3), (5,), (2, 3)):
            count = max(1, int(np.prod(shape)))
            bits = torch.randint(0, 2, (count * torch.empty((), dtype=dtype).element_size(),))
            state[f"{dtype}{shape}"] = bits.to(torch.uint8).view(dtype)[: int(np.prod(shape))].reshape(shape)
    assert_same(state, load_checkpoint(save_checkpoint(tmp_path / "c", state, step=0)))


def test_a_snapshot_is_of_its_moment(tmp_path):
    weight = torch.ones(3)
    snapshot = take_snapshot({"w": weight}, step=1)
    weight.zero_()
    write_snapshot(tmp_path / "c", snapshot)
    assert torch.equal(load_checkpoint(tmp_path / "c")["w"], torch.ones(3))


def test_free_space_is_looked_at_first(tmp_path, monkeypatch):
    store = CheckpointStore(folder=tmp_path)
    store.save({"v": 1}, 1)
    usage = SimpleNamespace(total=10**7, used=0, free=10**6)
    monkeypatch.setattr("phase5_training.checkpoint.shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr("phase5_training.checkpoint.write_folder", lambda *args: pytest.fail("it wrote"))
    with pytest.raises(NotSavedError, match=r"step 2 .* needs 1\.4 MB and 1\.0 MB are free.* make room"):
        store.save({"v": torch.zeros(10**5)}, 2)
    assert store.load_newest()[1] == {"v": 1}


def test_a_checkpoint_that_reads_back_as_something_else_is_not_saved(tmp_path, monkeypatch):
    store = CheckpointStore(folder=tmp_path)
    for step in (1, 2):
        store.save({"v": step}, step)
    real = os.fsync

    def flips(descriptor):
        if os.fstat(descriptor).st_size > 10**5:  # the tensors
            os.pwrite(os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY), b"\xff", 10**5)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", flips)
    with pytest.raises(NotSavedError, match=r"step 3 reads back as something else .*hash.* check the disk"):
        store.save({"v": torch.zeros(10**5)}, 3)
    monkeypatch.undo()
    assert len(store.paths()) == 3  # nothing was pruned for it
    assert store.load_newest()[1] == {"v": 2}


def hostile(folder, tensors=b"", tree=b"{}", manifest=None):
    """A checkpoint whose hashes are right and whose content is not."""
    folder.mkdir(parents=True)
    files = {"tensors.safetensors": tensors, "state.json": tree}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    hashes = {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in files.items()}
    found = {"format": 1, "step": 9, "files": hashes}
    (folder / "manifest.json").write_text(json.dumps({**found, **(manifest or {})}))


class Opens:
    def __reduce__(self):
        return open, ("broken-in", "w")


NO_TENSORS = (2).to_bytes(8, "little") + b"{}"
HOSTILE = {
    "a pickle in place of the tensors": {"tensors": pickle.dumps(Opens())},
    "a torch file in place of the tensors": {"tensors": b"PK\x03\x04" + pickle.dumps(Opens())},
    "a header of 2**63 bytes": {"tensors": (2**63 - 1).to_bytes(8, "little") + b"{}"},
    "a header past the end": {"tensors": (10**6).to_bytes(8, "little") + b"{}"},
    "a tensor past the end": {
        "tensors": (66).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4000000]}}'
    },
    "a state that is nested too deeply": {"tensors": NO_TENSORS, "tree": b"[" * 10**5},
    "a state that is a list": {"tensors": NO_TENSORS, "tree": b"[]"},
    "a key that cannot be one": {"tensors": NO_TENSORS, "tree": b'{"__items__": [[[], 1]]}'},
    "a tensor that is not there": {"tensors": NO_TENSORS, "tree": b'{"a": {"__tensor__": "b"}}'},
    "a name outside the folder": {
        "tensors": NO_TENSORS,
        "manifest": {"files": {"../../secret": {"bytes": 1, "sha256": ""}}},
    },
    "a manifest that is too large": {"tensors": NO_TENSORS, "manifest": {"x": "x" * 2**21}},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_checkpoint_is_refused_and_runs_nothing(tmp_path, case):
    store = CheckpointStore(folder=tmp_path / "checkpoints")
    store.save({"v": 1}, 5)
    hostile(store.path(9), **HOSTILE[case])
    refused = []
    assert store.load_newest(refused.append)[1] == {"v": 1}
    assert len(refused) == 1
    assert "\n" not in refused[0][:200]
    assert sorted(p.name for p in store.folder.iterdir()) == ["damaged-step-00000009", "step-00000005"]
    assert not (tmp_path / "broken-in").exists()


def test_one_more_than_is_kept_is_pruned_after_loading(tmp_path):
    """A save was killed between the new checkpoint and the pruning of the oldest."""
    store = CheckpointStore(folder=tmp_path)
    for step in (1, 2):
        store.save({"v": step}, step)
    save_checkpoint(store.path(3), {"v": 3}, step=3)
    (tmp_path / ".step-00000000.77.gone.tmp").mkdir()
    assert store.load_newest()[1] == {"v": 3}
    store.prune()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_one_to_go_back_to_is_kept(tmp_path):
    store = CheckpointStore(folder=tmp_path)
    for step in range(1, 7):
        store.begin({}, step, suspect=3).result()
    assert [p.name[-1] for p in store.paths()] == ["2", "5", "6"]
    store.prune(6)
    assert [p.name[-1] for p in store.paths()] == ["5", "6"]
