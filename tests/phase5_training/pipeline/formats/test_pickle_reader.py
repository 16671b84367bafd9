"""Pickle: round trips of plain data, and everything else refused by name."""

import collections
import contextlib
import io
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phase5_training.errors import DataError
from phase5_training.pipeline.formats import open_source
from phase5_training.pipeline.formats.pickle import DataUnpickler, ForbiddenGlobal

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner) | st.sets(st.integers())
    ),
    max_leaves=15,
)


@given(value=plain, protocol=st.sampled_from(PROTOCOLS))
@settings(max_examples=100, deadline=None)
def test_plain_data_round_trips(value, protocol):
    assert DataUnpickler(io.BytesIO(pickle.dumps(value, protocol))).load() == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(["a", "bc"]),
        np.array([1, "a", None], dtype=object),
        np.zeros(3, [("a", "f4"), ("b", "i8")]),
        np.arange(3, dtype=">i4"),
        np.float32(1.5),
        np.int64(7),
        np.bool_(True),
        np.zeros((0, 3)),
    ],
    ids=lambda a: f"{a.dtype}{a.shape}",
)
def test_numpy_round_trips(array, protocol):
    text = pickle.dumps(array, protocol)
    got = DataUnpickler(io.BytesIO(text)).load()
    assert got.dtype == pickle.loads(text).dtype  # numpy itself makes the byte order native
    assert np.array_equal(got, array)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tensors_and_containers_round_trip(protocol):
    value = {
        "t": torch.arange(6.0).reshape(2, 3).T,
        "o": collections.OrderedDict(a=1),
        "d": collections.deque([1]),
        "b": bytearray(b"xy"),
        "c": 1 + 2j,
    }
    got = DataUnpickler(io.BytesIO(pickle.dumps(value, protocol))).load()
    assert torch.equal(got.pop("t"), value.pop("t"))
    assert got == value


class Reduced:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def nested_torch():
    buffer = io.BytesIO()
    torch.save(Reduced(os.system, ("true",)), buffer)
    return Reduced(torch.storage._load_from_bytes, (buffer.getvalue(),))


HOSTILE = {
    "os.system": (
        lambda: Reduced(os.system, ("touch /tmp/forge-owned",)),
        "posix.system|os.system|nt.system",
    ),
    "eval": (lambda: Reduced(eval, ("1",)), "builtins.eval"),
    "exec": (lambda: Reduced(exec, ("1",)), "builtins.exec"),
    "open": (lambda: Reduced(open, ("/etc/passwd",)), "open"),
    "getattr": (lambda: Reduced(getattr, ([], "append")), "builtins.getattr"),
    "import": (lambda: Reduced(__import__, ("os",)), "builtins.__import__"),
    "pickle.loads": (lambda: Reduced(pickle.loads, (b"N.",)), "pickle.loads"),
    "numpy.load": (lambda: Reduced(np.load, ("/etc/passwd",)), "numpy.load"),
    "numpy.fromfile": (lambda: Reduced(np.fromfile, ("/etc/passwd",)), "fromfile"),
    "torch.load": (lambda: Reduced(torch.load, ("/etc/passwd",)), "torch"),
    "model": (lambda: torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear|copy_reg._reconstructor"),
    "partial": (lambda: __import__("functools").partial(print, 1), "functools.partial"),
    "big bytes": (lambda: Reduced(bytes, (10**12,)), "bytes made from something else"),
    "big bytearray": (lambda: Reduced(bytearray, (10**12,)), "bytearray made from something else"),
    "big array": (
        lambda: Reduced(np._core.multiarray._reconstruct, (np.ndarray, (10**12,), b"b")),
        "not rebuilt from empty",
    ),
    "object scalar": (
        lambda: Reduced(np._core.multiarray.scalar, (np.dtype("O"), b"x")),
        "not plain bytes",
    ),
    "short scalar": (lambda: Reduced(np._core.multiarray.scalar, (np.dtype("f8"), b"x")), "not plain bytes"),
    "object buffer": (
        lambda: Reduced(np._core.numeric._frombuffer, (b"x" * 8, np.dtype("O"), (1,), "C")),
        "array of objects over raw memory",
    ),
    "tensor over a list": (
        lambda: Reduced(torch._utils._rebuild_tensor_v2, ([1], 0, (1,), (1,), False, None)),
        "not a storage",
    ),
    "tensor past its storage": (
        lambda: Reduced(
            torch._utils._rebuild_tensor_v2, (torch.zeros(2)._typed_storage(), 0, (10**9,), (1,), False, None)
        ),
        "a tensor larger than its storage",
    ),
    "code in a nested torch file": (
        nested_torch,
        "cannot be read as a pickle of plain data: .*(system|GLOBAL)",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_hostile_pickles_are_refused_and_named(tmp_path, name, protocol):
    make, message = HOSTILE[name]
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"samples": [{"input": make(), "target": 0}]}, protocol))
    with pytest.raises(DataError, match=r"a\.pkl.*(" + message + ")") as caught:
        open_source(path)
    assert "\n" not in str(caught.value)
    assert not os.path.exists("/tmp/forge-owned")


def test_a_dotted_name_does_not_slip_through():
    for module, name in [
        ("numpy", "ndarray.__class__"),
        ("collections", "OrderedDict.__init__"),
        ("torch", "load"),
    ]:
        stream = b"\x80\x04" + pickle.SHORT_BINUNICODE + bytes([len(module)]) + module.encode()
        stream += pickle.SHORT_BINUNICODE + bytes([len(name)]) + name.encode() + pickle.STACK_GLOBAL + b"."
        with pytest.raises(ForbiddenGlobal):
            DataUnpickler(io.BytesIO(stream)).load()
    with pytest.raises(ForbiddenGlobal, match="persistent"):
        DataUnpickler(io.BytesIO(b"Pid\n.")).load()


def test_loading_changes_nothing_in_numpy():
    # A pickled dtype carries a state that is applied to it; it must not land on the shared one.
    text = pickle.dumps(np.arange(3, dtype=">i4"))
    DataUnpickler(io.BytesIO(text)).load()
    assert np.dtype("i4").byteorder == "="


def test_a_torch_file_with_code(tmp_path):
    torch.save({"inputs": Reduced(os.system, ("true",))}, tmp_path / "a.pt")
    with pytest.raises(DataError, match=r"a\.pt: cannot be read as a pickle of plain data: .*system"):
        open_source(tmp_path / "a.pt")
    (tmp_path / "a.pt").rename(tmp_path / "a.pkl")
    with pytest.raises(DataError, match=r"a\.pkl: .*system"):
        open_source(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    "data",
    [
        {"samples": [{"input": np.full(2, i), "target": i} for i in range(3)]},
        [{"input": torch.full((2,), i), "target": torch.tensor(i)} for i in range(3)],
        {"inputs": np.repeat(np.arange(3), 2).reshape(3, 2), "targets": np.arange(3)},
        {"inputs": [[0, 0], [1, 1], [2, 2]], "targets": (0, 1, 2)},
        (np.repeat(np.arange(3), 2).reshape(3, 2), np.arange(3)),
        {"x": torch.arange(3)[:, None].expand(3, 2), "y": torch.arange(3)},
    ],
    ids=range(6),
)
@pytest.mark.parametrize("extension", ["pkl", "pt"])
def test_forms_of_data(tmp_path, data, extension):
    path = tmp_path / f"a.{extension}"
    if extension == "pkl":
        path.write_bytes(pickle.dumps(data))
    else:
        torch.save(to_torch(data), path)
    columns = open_source(path).gather(np.array([2, 1]))
    assert np.asarray(columns.input).tolist() == [[2, 2], [1, 1]]
    assert np.asarray(columns.target).tolist() == [2, 1]


def to_torch(value):
    if isinstance(value, dict):
        return {k: to_torch(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_torch(v) for v in value)
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def test_bfloat16_tensors(tmp_path):
    torch.save(
        {"inputs": torch.ones(3, 2, dtype=torch.bfloat16), "targets": torch.arange(3)}, tmp_path / "a.pt"
    )
    assert open_source(tmp_path / "a.pt").gather(np.array([0])).input.dtype == np.float32


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the data set is empty"),
        (3, "holds int; wanted a list of records"),
        ({"a": 1}, r"has no 'samples' list and no 'inputs' \(its keys: 'a'\)"),
        ({"inputs": [[1], [1, 2]], "targets": [1]}, "inputs has 2 rows and targets has 1"),
        ({"inputs": np.float64(3)}, "wanted an array|single number"),
        ({"inputs": np.ones(2), "targets": [1, None]}, "targets row 1 has null or mixed values"),
        ({"inputs": np.ones(2, complex)}, "complex128"),
    ],
)
def test_wrong_contents(tmp_path, data, message):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(data))
    with pytest.raises(DataError, match=r"a\.pkl.*" + message):
        open_source(tmp_path / "a.pkl")


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_random_bytes_never_escape(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "fuzz.pkl"
    path.write_bytes(raw)
    with contextlib.suppress(DataError):
        open_source(path)


def test_a_model_in_a_torch_file_is_named(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(
        DataError, match=r"a\.pt: the pickle asks for torch\.nn.*Linear, which is not data; .*save"
    ):
        open_source(tmp_path / "a.pt")


def test_a_tensor_that_is_negated_when_it_is_read(tmp_path):
    values = torch.randn(4, 3, dtype=torch.complex64).conj()
    torch.save({"inputs": values.imag, "targets": torch.arange(4)}, tmp_path / "a.pt")
    found = open_source(tmp_path / "a.pt").gather(np.arange(4)).input
    np.testing.assert_array_equal(found, values.resolve_conj().imag.resolve_neg().numpy())
