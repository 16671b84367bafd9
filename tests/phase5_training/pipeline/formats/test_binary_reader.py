""".npy, .npz, .safetensors, token .bin and .txt against numpy, and damaged files."""

import io
import json
import struct
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from phase5_training.errors import DataError
from phase5_training.pipeline.data_config import DataConfig
from phase5_training.pipeline.data_loader import DataLoaderFactory
from phase5_training.pipeline.formats import open_source
from phase5_training.pipeline.formats.source import ReadOptions

MODES = [ReadOptions(), ReadOptions(streaming=True)]
X, Y = np.arange(24, dtype=np.float32).reshape(8, 3), np.arange(8) % 3
DTYPES = st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.int32, np.uint8, np.bool_])


def gather_all(path, options=None):
    source = open_source(path, options)
    return source.gather(np.arange(len(source)))


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors"])
@pytest.mark.parametrize("options", MODES, ids=["memory", "streaming"])
@given(x=DTYPES.flatmap(lambda d: arrays(d, array_shapes(max_dims=3, max_side=5))), seed=st.integers(0, 9))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arrays_round_trip(tmp_path, kind, options, x, seed):
    path, y = tmp_path / f"a.{kind}", np.arange(len(x))
    if kind == "npy":
        np.save(path, x)
        np.save(tmp_path / "a_targets.npy", y)
    elif kind == "npz":
        np.savez_compressed(path, inputs=x, targets=y)
    else:
        safetensors.numpy.save_file({"inputs": x, "targets": y}, path)
    source = open_source(path, options)
    picked = np.random.default_rng(seed).integers(0, len(x), 7)
    columns = source.gather(picked)
    assert columns.input.dtype == x.dtype
    assert np.array_equal(columns.input, x[picked], equal_nan=x.dtype.kind == "f")
    assert np.array_equal(columns.target, picked)


def test_fortran_order_structured_arrays_and_quality(tmp_path):
    np.save(tmp_path / "f.npy", np.asfortranarray(X))
    for options in MODES:
        assert np.array_equal(gather_all(tmp_path / "f.npy", options).input, X)
    records = np.zeros(8, [("input", "f4", 3), ("target", "i8"), ("quality", "f8")])
    records["input"], records["target"], records["quality"] = X, Y, 0.5
    np.save(tmp_path / "s.npy", records)
    for options in MODES:
        columns = gather_all(tmp_path / "s.npy", options)
        assert np.array_equal(columns.input, X)
        assert np.array_equal(columns.target, Y)
        assert columns.quality.tolist() == [0.5] * 8
    np.save(tmp_path / "q.npy", X)
    np.save(tmp_path / "q_quality.npy", np.arange(8) / 8)
    assert gather_all(tmp_path / "q.npy").quality.tolist() == (np.arange(8) / 8).tolist()


def test_named_targets_and_bfloat16(tmp_path):
    np.savez(tmp_path / "a.npz", inputs=X, **{"targets.kind": Y, "targets.size": X[:, 0]})
    assert sorted(gather_all(tmp_path / "a.npz").target) == ["kind", "size"]
    from safetensors.torch import save_file

    save_file({"inputs": torch.from_numpy(X).bfloat16(), "extra": torch.ones(2)}, tmp_path / "b.safetensors")
    assert np.array_equal(gather_all(tmp_path / "b.safetensors").input, X)


def npy_bytes(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npy_header(shape, dtype="<f4", payload=b""):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + payload


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy_bytes(X)[:-4], r"declares shape \(8, 3\) of float32, 96 bytes, and holds 92"),
        (npy_bytes(X) + b"more", "and holds 100"),
        (npy_header((10**12, 3)), "declares shape"),
        (npy_header((2**62, 2**62, 2**62)), "declares shape"),
        (npy_header((-4, 3)), "impossible shape"),
        (npy_header((4,), "|O", b"x" * 32), "holds Python objects"),
        (npy_header("__import__('os')"), "not a .npy file"),
        (npy_bytes(np.float32(3)), "single number"),
        (npy_bytes(np.zeros((0, 3))), "is empty"),
        (npy_bytes(np.ones(3, complex)), "complex128"),
        (b"\x93NUMPY\x09\x00" + b"x" * 100, "version .* is unknown|not a .npy file"),
    ],
)
def test_damaged_npy(tmp_path, content, message):
    (tmp_path / "a.npy").write_bytes(content)
    for options in MODES:
        with pytest.raises(DataError, match=r"a\.npy.*" + message):
            open_source(tmp_path / "a.npy", options)


def test_damaged_npz(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inputs.npy", npy_header((10**10,)))
    with pytest.raises(DataError, match=r"a\.npz \[inputs\]: declares shape"):
        open_source(path)
    np.savez(path, inputs=np.array([{}], dtype=object))
    with pytest.raises(DataError, match=r"\[inputs\]: holds Python objects"):
        open_source(path)
    np.savez(path, stuff=X)
    with pytest.raises(DataError, match=r"holds \['stuff'\]; wanted an array named 'inputs'"):
        open_source(path)
    np.savez(path, inputs=X, targets=Y[:3])
    with pytest.raises(DataError, match="inputs has 8 rows and targets has 3"):
        open_source(path)
    with pytest.raises(DataError, match="cannot be streamed"):
        open_source(path, ReadOptions(streaming=True, memory_limit=10))
    raw = bytearray(path.read_bytes())
    raw[200:220] = b"z" * 20
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.npz"):
        open_source(path)


def test_damaged_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"inputs": X}, path)
    good = path.read_bytes()
    header = {"inputs": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 96]}}
    text = json.dumps(header).encode()
    for content in (good[:-8], good + b"x", b"\xff" * 16, struct.pack("<Q", len(text)) + text + b"\0" * 96):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.safetensors: not a readable"):
            open_source(path)


# --- tokens --------------------------------------------------------------------------------------


def write_tokens(path, tokens, vocab_size=1000, **sidecar):
    tokens.tofile(path)
    stated = {"dtype": str(tokens.dtype), "vocab_size": vocab_size, **sidecar}
    path.with_name(path.name + ".json").write_text(json.dumps(stated))
    return path


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32"])
@given(n=st.integers(2, 80), block=st.integers(1, 12))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blocks_predict_each_token_once(tmp_path, dtype, n, block):
    tokens = np.arange(n).astype(dtype)
    path = write_tokens(tmp_path / "t.bin", tokens)
    if n < block + 1:
        with pytest.raises(DataError, match=f"{n} tokens are fewer than one block of {block + 1}"):
            open_source(path, ReadOptions(block_length=block))
        return
    rows = gather_all(path, ReadOptions(block_length=block)).input
    assert np.array_equal(rows[:, 0], np.arange(len(rows)) * block)
    predicted = rows[:, 1:].reshape(-1)
    assert np.array_equal(predicted, np.arange(1, 1 + len(predicted)))
    assert n - 1 - len(predicted) < block


def test_tokens_through_the_loader(tmp_path):
    write_tokens(tmp_path / "a.bin", np.arange(100, dtype=np.uint16), 200)
    write_tokens(tmp_path / "b.bin", np.arange(100, 150, dtype=np.uint16), 200)
    loader = DataLoaderFactory.create_loader(tmp_path, DataConfig(max_length=16, batch_size=4))
    assert loader.spec.vocab_size == 200
    assert loader.spec.max_token == 144  # the 5 tokens after the last whole block are not used
    assert loader.spec.input_shape == (16,)
    assert loader.spec.task == "next_token"
    assert loader.description()["source"]["tokens_unused"] == 5
    for batch in loader:
        assert batch["input"].dtype == torch.int64
        assert torch.equal(batch["target"], batch["input"] + 1)
        assert torch.equal(batch["input"][:, 0], batch["index"] * 16)


@pytest.mark.parametrize(
    ("sidecar", "message"),
    [
        (None, r"has no sidecar t.bin.json; write one"),
        ("{", "t.bin.json line 1: not valid JSON"),
        ("[]", "wanted an object"),
        ('{"dtype": "float32", "vocab_size": 4}', "dtype is 'float32'; wanted uint8|uint16"),
        ('{"vocab_size": 4}', "dtype is None"),
        ('{"dtype": "uint8"}', "vocab_size is None"),
        ('{"dtype": "uint8", "vocab_size": true}', "vocab_size is True"),
        ('{"dtype": "uint32", "vocab_size": 9}', "1001 bytes are no whole number of uint32 tokens"),
    ],
)
def test_bad_sidecars(tmp_path, sidecar, message):
    (tmp_path / "t.bin").write_bytes(b"\1" * 1001)
    if sidecar is not None:
        (tmp_path / "t.bin.json").write_text(sidecar)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / "t.bin")


def test_tokens_beyond_the_vocabulary(tmp_path):
    path = write_tokens(tmp_path / "t.bin", np.arange(300, dtype=np.uint16), 100)
    with pytest.raises(DataError, match=r"t\.bin: holds token 256, but the vocabulary has 100 tokens"):
        DataLoaderFactory.create_loader(path)


# --- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"streaming": True}])
def test_text_files_are_one_stream_of_bytes(tmp_path, options):
    texts = ["first file, ", "", "zweite Datei: ü ", "third " * 30]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, "utf-8")
    joined = "".join(texts).encode()
    config = DataConfig(max_length=10, shuffle=False, batch_size=100, **options)
    (batch,) = DataLoaderFactory.create_loader(tmp_path, config)
    usable = (len(joined) - 1) // 10 * 10
    assert bytes(batch["input"].reshape(-1).tolist()) == joined[:usable]
    assert bytes(batch["target"].reshape(-1).tolist()) == joined[1 : usable + 1]


def test_text_with_a_tokenizer(tmp_path):
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, "[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "t.txt").write_text("a b a a b b c a b")
    config = DataConfig(max_length=4, shuffle=False, tokenizer=tmp_path / "tokenizer.json")
    loader = DataLoaderFactory.create_loader(tmp_path / "t.txt", config)
    (batch,) = loader
    assert batch["input"].tolist() == [[1, 2, 1, 1], [2, 2, 0, 1]]
    assert batch["target"].tolist() == [[2, 1, 1, 2], [2, 0, 1, 2]]
    assert loader.spec.vocab_size == 3
    (tmp_path / "t.txt").write_bytes(b"a b \xff")
    with pytest.raises(DataError, match=r"t\.txt: byte 4 is not UTF-8"):
        DataLoaderFactory.create_loader(tmp_path / "t.txt", config)


def test_empty_text(tmp_path):
    (tmp_path / "t.txt").write_text("")
    with pytest.raises(DataError, match="the file is empty"):
        open_source(tmp_path / "t.txt")
