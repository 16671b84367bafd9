"""HDF5 against plain h5py, and what is refused."""

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phase5_training.errors import DataError
from phase5_training.pipeline.formats import hdf5, open_source
from phase5_training.pipeline.formats.source import ReadOptions

MODES = [ReadOptions(), ReadOptions(streaming=True)]
X, Y = np.arange(60, dtype=np.float32).reshape(20, 3), np.arange(20) % 4


def write(path, x=X, y=Y, where="/dataset", **options):
    with h5py.File(path, "w") as file:
        group = file.require_group(where)
        group.create_dataset("inputs", data=x, **options)
        if y is not None:
            group["targets"] = y
    return path


@pytest.mark.parametrize("options", MODES, ids=["memory", "streaming"])
@pytest.mark.parametrize("layout", [{}, {"chunks": (7, 2)}, {"chunks": (4, 3), "compression": "gzip"}])
@given(indices=st.lists(st.integers(0, 19), min_size=1, max_size=30))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_gather_is_what_h5py_reads(tmp_path, options, layout, indices):
    path = write(tmp_path / "a.h5", **layout)
    columns = open_source(path, options).gather(np.array(indices))
    assert np.array_equal(columns.input, X[indices])
    assert np.array_equal(columns.target, Y[indices])
    assert columns.index.tolist() == indices


@pytest.mark.parametrize("options", MODES, ids=["memory", "streaming"])
def test_text_quality_attributes_and_named_targets(tmp_path, options):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        group = file.create_group("dataset")
        group["inputs"] = ["one", "zwei", "trois"]
        group["targets/kind"] = ["a", "b", "a"]
        group["targets/size"] = [1.0, 2.0, 3.0]
        group["quality"] = [0.1, 0.9, 0.5]
        group.attrs["source"] = "test"
        group.create_group("metadata").attrs["version"] = 3
    source = open_source(path, options)
    columns = source.gather(np.array([2, 0]))
    assert columns.input == ["trois", "one"]
    assert columns.target["kind"] == ["a", "a"]
    assert columns.target["size"].tolist() == [3, 1]
    assert columns.quality.tolist() == [0.5, 0.1]
    assert source.describe()["attributes"] == {"source": "test"}
    assert source.describe()["metadata"] == {"version": 3}


@pytest.mark.parametrize("options", MODES, ids=["memory", "streaming"])
def test_texts_of_any_length_are_read_a_few_at_a_time(tmp_path, options, monkeypatch):
    monkeypatch.setattr(hdf5, "INFLATED_FLOOR", 1)  # 16 at a time
    texts = ["é" * (i * 7 % 50) + str(i) for i in range(50)]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("dataset/inputs", data=texts, dtype=h5py.string_dtype(), chunks=(20,))
        file["dataset/targets"] = np.array([text.encode() for text in texts])  # of one length, padded
    source = open_source(tmp_path / "a.h5", options)
    order = np.random.default_rng(0).permutation(50)
    columns = source.gather(order)
    assert columns.input == [texts[i] for i in order]
    assert columns.target == [
        texts[i].encode().decode("ascii", "replace") for i in order
    ]  # so it is declared
    assert [text for chunk in source.iterate() for text in chunk.input] == texts


def test_texts_in_place_are_read_in_portions_that_go_by_the_size_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5, "CHUNK_BYTES", 20_000)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("dataset/inputs", data=["a" * 1000] * 200, dtype=h5py.string_dtype())
    source = open_source(tmp_path / "a.h5", MODES[1])
    assert source.nbytes == (tmp_path / "a.h5").stat().st_size > 200_000
    assert all(len(chunk.input) <= 20 for chunk in source.iterate())


def test_long_attributes_are_cut(tmp_path):
    with h5py.File(write(tmp_path / "a.h5"), "r+") as file:
        attributes = file["dataset"].attrs
        attributes["note"], attributes["notes"] = "n" * 999, ["a", "b"]
        attributes["figures"] = np.arange(20)
    assert open_source(tmp_path / "a.h5").describe()["attributes"] == {
        "note": "n" * 200,
        "notes": "values of shape (2,)",
        "figures": [0, 1, 2, 3, 4, 5, 6, 7],
    }


def test_arrays_at_the_top_level(tmp_path):
    source = open_source(write(tmp_path / "a.h5", where="/"))
    assert np.array_equal(source.gather(np.arange(20)).input, X)


def test_a_soft_link_inside_the_file_is_followed(tmp_path):
    path = write(tmp_path / "a.h5", where="/real")
    with h5py.File(path, "a") as file:
        file["dataset"] = h5py.SoftLink("/real")
    assert len(open_source(path)) == 20


def external_link(file, folder):
    with h5py.File(folder / "secret.h5", "w") as other:
        other["x"] = X
    file["dataset/inputs"] = h5py.ExternalLink("secret.h5", "/x")


def external_group(file, folder):
    with h5py.File(folder / "secret.h5", "w") as other:
        other["inputs"] = X
    file["dataset"] = h5py.ExternalLink("secret.h5", "/")


def soft_to_external(file, folder):
    external_link(file, folder)
    file["dataset/real"] = h5py.ExternalLink("secret.h5", "/x")
    del file["dataset/inputs"]
    file["dataset/inputs"] = h5py.SoftLink("real")


def external_target(file, folder):
    external_link(file, folder)
    file["dataset/targets/a"] = h5py.ExternalLink("secret.h5", "/x")
    del file["dataset/inputs"]
    file["dataset/inputs"] = X


def external_storage(file, folder):
    (folder / "raw").write_bytes(b"\0" * 240)
    file.create_dataset(
        "dataset/inputs", (20, 3), np.float32, external=[(str(folder / "raw"), 0, h5py.h5f.UNLIMITED)]
    )


def virtual(file, folder):
    with h5py.File(folder / "secret.h5", "w") as other:
        other["x"] = X
    layout = h5py.VirtualLayout((20, 3), np.float32)
    layout[:] = h5py.VirtualSource(folder / "secret.h5", "x", (20, 3))
    file.create_group("dataset").create_virtual_dataset("inputs", layout)


def unwritten(file, folder):
    file.create_dataset("dataset/inputs", (10**9, 10**3), np.float32, chunks=(100, 100))


def endless_links(file, folder):
    file["dataset/inputs"] = h5py.SoftLink("/dataset/inputs2")
    file["dataset/inputs2"] = h5py.SoftLink("/dataset/inputs")


def compound(file, folder):
    file["dataset/inputs"] = np.zeros(4, [("a", "f4")])


def ragged(file, folder):
    data = file.create_dataset("dataset/inputs", (2,), h5py.vlen_dtype(np.int32))
    data[0] = [1, 2]


def plugin(file, folder):
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((4,))
    properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (1,))
    file.create_group("dataset")
    h5py.h5d.create(
        file["dataset"].id, b"inputs", h5py.h5t.NATIVE_FLOAT, h5py.h5s.create_simple((8,)), dcpl=properties
    )


def scalar(file, folder):
    file["dataset/inputs"] = 3.0


def table_of_texts(file, folder):
    file.create_dataset("dataset/inputs", data=[["a", "b"], ["c", "d"]], dtype=h5py.string_dtype())


def empty(file, folder):
    file["dataset/inputs"] = np.zeros((0, 3))


def no_inputs(file, folder):
    file["dataset/imputs"] = X


def both(file, folder):
    file["dataset/inputs"] = X
    file["dataset/x"] = X


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (external_link, "'inputs' is an external link to 'secret.h5'"),
        (external_group, "'dataset' is an external link"),
        (soft_to_external, "'real' is an external link"),
        (external_target, "'a' is an external link"),
        (external_storage, "is stored in .*raw"),
        (virtual, "is a virtual data set"),
        (unwritten, "declares shape .* but only 0 of"),
        (endless_links, "chain of more than 8 soft links"),
        (compound, "wanted numbers or strings"),
        (ragged, "wanted numbers or strings"),
        (table_of_texts, r"has shape \(2, 2\); wanted one text for each record"),
        (plugin, "plug-in filter 32015"),
        (scalar, "is not an array with one row per record"),
        (empty, "is empty; wanted at least one record"),
        (no_inputs, r"no array /dataset/inputs \(the file holds \['dataset'\], dataset holds \['imputs'\]\)"),
        (both, "has both 'inputs' and 'x'"),
    ],
)
def test_refused(tmp_path, make, message):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        make(file, tmp_path)
    with pytest.raises(DataError, match=r"a\.h5: .*" + message) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


def test_rows_must_match(tmp_path):
    with pytest.raises(DataError, match="inputs has 20 rows and targets has 5"):
        open_source(write(tmp_path / "a.h5", y=Y[:5]))


def test_a_cut_file(tmp_path):
    path = write(tmp_path / "a.h5")
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match=r"a\.h5: cannot be opened as HDF5"):
        open_source(path)
