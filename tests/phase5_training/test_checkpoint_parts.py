"""Checkpoints in parts, without the processes that write them: files made by hand, which torch reads too.

That real processes write such files, agree on them and go on from them is shown in test_distributed.py.
"""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from phase5_training.checkpoint import (
    CheckpointError,
    CheckpointStore,
    load_checkpoint,
    save_checkpoint,
    verify,
)
from phase5_training.tensor_files import tensor_file

WEIGHT = torch.arange(30.0).reshape(6, 5)
TREE = {"w": {"__tensor__": "state.w"}, "b": {"__tensor__": "state.b"}, "step": 7}


def shard(number):
    return f"shard-{number:05d}-model-00001-of-00001.safetensors"


def write_manifest(folder, **changes):
    """Hash what lies in a folder, as a save does."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    manifest = {"format": 2, "step": 7, "versions": {}, "files": files, **changes}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def write_shard(path, start, rows, **others):
    """What the process writes that has these rows of the weight."""
    tensors = {"state.w": WEIGHT[start : start + rows], **others}
    places = {
        n: {"saved_offsets": [start, 0] if n == "state.w" else [0] * t.dim()} for n, t in tensors.items()
    }
    about = {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"}
    path.write_bytes(b"".join(tensor_file(tensors, about)))


@pytest.fixture
def parts(tmp_path):
    """Return a checkpoint that three processes have written, two rows each."""
    folder = tmp_path / "checkpoints" / "step-00000007"
    folder.mkdir(parents=True)
    for number in (1, 2, 3):
        others = {"state.b": torch.tensor([1, 2], dtype=torch.int8)} if number == 1 else {}
        write_shard(folder / shard(number), 2 * number - 2, 2, **others)
    (folder / "state.json").write_text(json.dumps(TREE))
    write_manifest(folder)
    return folder


def test_parts_are_read_whole(parts):
    state = load_checkpoint(parts)
    assert torch.equal(state["w"], WEIGHT)
    assert state["b"].tolist() == [1, 2]
    assert state["b"].dtype == torch.int8
    assert state["step"] == 7


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_them_too(parts):
    found = {"state.w": torch.zeros(6, 5), "state.b": torch.zeros(2, dtype=torch.int8)}
    load(found, storage_reader=HuggingFaceStorageReader(str(parts)), no_dist=True)
    assert torch.equal(found["state.w"], WEIGHT)
    assert sorted(load_file(parts / shard(1))) == ["state.b", "state.w"]


def flip(folder):
    content = bytearray((folder / shard(2)).read_bytes())
    content[-3] ^= 4
    (folder / shard(2)).write_bytes(content)


def cut(folder):
    path = folder / shard(3)
    path.write_bytes(path.read_bytes()[:-8])


def add(folder):
    save_file({"state.w": WEIGHT}, folder / shard(4))


def lose_rows(folder):
    write_shard(folder / shard(2), 2, 1)
    write_manifest(folder)


def overlap(folder):
    write_shard(folder / shard(2), 1, 2)
    write_manifest(folder)


def lose_a_file(folder):
    (folder / shard(3)).unlink()


def without_a_place(folder):
    save_file({"state.w": WEIGHT[2:4]}, folder / shard(2), {"DCP_SHARDING_INFO": "{}"})
    write_manifest(folder)


def endless(folder):
    """A weight of 2**62 rows, as the note of its place has it."""
    about = {"DCP_SHARDING_INFO": json.dumps({"state.w": {"saved_offsets": [2**62, 0]}})}
    (folder / shard(3)).write_bytes(b"".join(tensor_file({"state.w": WEIGHT[4:]}, about)))
    write_manifest(folder)


def nested(folder):
    about = {"DCP_SHARDING_INFO": "[" * 100_000}
    (folder / shard(3)).write_bytes(b"".join(tensor_file({"state.w": WEIGHT[4:]}, about)))
    write_manifest(folder)


def pickled(folder):
    (folder / shard(3)).write_bytes(b"\x80\x04cos\nsystem\n(S'exit'\ntR.")
    write_manifest(folder)


def outside(folder):
    write_manifest(folder, files={"../../secret.safetensors": {"bytes": 0, "sha256": ""}, "state.json": {}})


def no_state(folder):
    (folder / "state.json").unlink()
    write_manifest(folder)


def a_list(folder):
    write_manifest(folder, files=["state.json", shard(1)])


DAMAGES = [
    flip, cut, add, lose_rows, overlap, lose_a_file, without_a_place, endless, nested, pickled, outside,
    no_state, a_list,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_hostile_part_is_refused_and_the_checkpoint_before_is_taken(parts, damage):
    save_checkpoint(parts.parent / "step-00000003", {"w": WEIGHT, "step": 3}, step=3)
    damage(parts)
    refused = []
    path, state = CheckpointStore(folder=parts.parent).load_newest(refused.append)
    assert path.name == "step-00000003"
    assert state["step"] == 3
    assert len(refused) == 1
    assert "renamed to damaged-step-00000007" in refused[0]
    assert "\n" not in refused[0]


def test_a_process_reads_its_share_of_the_files_only(parts):
    flip(parts)  # the second of three
    for process in (0, 2):
        assert len(verify(parts, (process, 3))) == 3
    with pytest.raises(CheckpointError, match=f"{shard(2)} does not match its hash"):
        verify(parts, (1, 3))
    with pytest.raises(CheckpointError, match=f"{shard(2)} does not match its hash"):
        verify(parts, (0, 1))
