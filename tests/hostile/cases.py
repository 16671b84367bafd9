"""The table of hostile files: how each is made, and the one line that Forge must answer with.

A case writes its files into a folder and returns what is to be opened. Beside the folder lies `secret`,
which no reader may touch, and `ran`, which a payload would make.
"""

import collections
import copyreg
import functools
import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import safetensors.numpy
import torch

SECRET = 4242  # what the files outside of the folder hold
X, Y = np.arange(12, dtype=np.float32).reshape(4, 3), np.array([0, 1, 2, 1])


@dataclass(frozen=True)
class Case:
    """A hostile file: ``refused`` is the message when it is opened with records that fail.

    With records that drop, ``dropped`` maps positions to reasons; None says the file is refused as a whole.
    """

    name: str
    write: Callable[[Path], Any]
    refused: str
    dropped: dict[int, str] | None = None
    options: dict[str, Any] = field(default_factory=dict)


def ran(folder: Path) -> Path:
    """The file that a payload makes."""
    return folder.parent / "ran"


def secret(folder: Path, name: str) -> Path:
    """A data file outside of the folder."""
    path = folder.parent / "secret" / name
    path.parent.mkdir(exist_ok=True)
    return path


# --- pickle ----------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def pickled(make: Callable[[Path], Any], name: str = "a.pkl", protocol: int = 4) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(pickle.dumps(make(folder), protocol))
        return path

    return write


def raw(content: bytes | Callable[[], bytes], name: str) -> Callable[[Path], Path]:
    """A file of these bytes; large ones are made when they are written."""

    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content() if callable(content) else content)
        return folder / name

    return write


def touch(folder: Path) -> str:
    return f"touch {ran(folder)}"


def nested_in_torch(folder: Path) -> Any:
    inner = pickle.dumps(Calls(os.system, touch(folder)), 2)
    return {"inputs": Calls(torch.storage._load_from_bytes, inner)}


def torch_zip(folder: Path) -> Path:
    path = folder / "a.pt"
    torch.save({"inputs": Calls(os.system, touch(folder))}, path)
    return path


def object_array(folder: Path) -> Any:
    held = np.empty(2, object)
    held[:] = [Calls(os.system, touch(folder)), 1]
    return {"inputs": held}


def stack_global(module: str, name: str, *arguments: Any) -> bytes:
    """A protocol 4 pickle that calls ``module.name(*arguments)``."""
    body = b"\x80\x04"
    for text in (module, name):
        body += b"\x8c" + bytes([len(text)]) + text.encode()
    body += b"\x93(" + b"".join(pickle.dumps(a, 2)[2:-1] for a in arguments) + b"tR."
    return body


def billion_laughs(levels: int = 12, width: int = 10) -> Any:
    row: Any = [1.0] * width
    for _ in range(levels):
        row = [row] * width
    return {"inputs": row}


def itself() -> Any:
    loop: list = [1]
    loop.append(loop)
    return {"inputs": [loop, loop]}


def deep(levels: int) -> bytes:
    return b"\x80\x02" + b"]" * levels + b"a" * (levels - 1) + b"."


def colliding_keys(count: int = 60_000) -> bytes:
    """A pickle of a dictionary whose keys all have the hash 0."""
    body = b"\x80\x04}("
    for k in range(count):
        body += b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N"
    return body + b"u."


def colliding_torch(folder: Path) -> Path:
    path = folder / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", colliding_keys())
        archive.writestr("a/version", "3")
    return path


class Made:
    """Pickles as a call of ``function`` and a state."""

    def __init__(self, function: Any, arguments: tuple, state: tuple) -> None:
        self.made = (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.made


def rows_of(field: np.dtype, offset: int) -> Any:
    """An array of two rows of 8 bytes whose dtype has ``field`` at ``offset``, and says it is plain."""
    state = (3, "|", None, ("input",), {"input": (field, offset)}, 8, 1, 0)
    dtype = Made(np.dtype, ("V8", False, True), state)
    empty = (np.ndarray, (0,), b"b")
    return Made(np._core.multiarray._reconstruct, empty, (1, (2,), dtype, False, b"A" * 16))


def expanded(folder: Path) -> Path:
    path = folder / "a.pt"
    torch.save({"inputs": torch.zeros(1, 1).expand(10**10, 4)}, path)
    return path


def torch_bomb(folder: Path) -> Path:
    plain, path = folder / "plain", folder / "a.pt"
    torch.save({"inputs": torch.zeros(1 << 22, 4)}, plain)
    with zipfile.ZipFile(plain) as good, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for item in good.infolist():
            bomb.writestr(item.filename, good.read(item))
    plain.unlink()
    return path


def sparse(folder: Path) -> Path:
    path = folder / "a.pt"
    torch.save({"inputs": torch.sparse_coo_tensor(torch.zeros(2, 1), torch.ones(1), (10**7, 10**4))}, path)
    return path


PICKLE = [
    Case("pickle calls os.system", pickled(lambda f: Calls(os.system, touch(f))), r"asks for posix\.system"),
    Case(
        "pickle of protocol 0 calls os.system",
        pickled(lambda f: Calls(os.system, touch(f)), protocol=0),
        r"asks for posix\.system",
    ),
    Case(
        "pickle calls eval", pickled(lambda f: Calls(eval, f"open({str(ran(f))!r}, 'w')")), r"builtins\.eval"
    ),
    Case(
        "pickle calls exec", pickled(lambda f: Calls(exec, f"open({str(ran(f))!r}, 'w')")), r"builtins\.exec"
    ),
    Case("pickle opens a file", pickled(lambda f: Calls(open, str(ran(f)), "w")), r"asks for io\.open"),
    Case("pickle imports", pickled(lambda f: Calls(__import__, "os")), r"builtins\.__import__"),
    Case(
        "pickle starts a program",
        pickled(lambda f: Calls(subprocess.Popen, ["touch", str(ran(f))])),
        r"subprocess\.Popen",
    ),
    Case(
        "pickle binds arguments",
        pickled(lambda f: [functools.partial(os.system, touch(f))]),
        r"asks for functools\.partial",
    ),
    Case(
        "pickle rebuilds a class",
        pickled(lambda f: Calls(copyreg._reconstructor, object, object, None)),
        r"copyreg\._reconstructor",
    ),
    Case(
        "pickle gets attributes",
        raw(stack_global("builtins", "getattr", [], "append"), "a.pkl"),
        r"builtins\.getattr",
    ),
    Case(
        "pickle names through a dot",
        raw(stack_global("builtins", "bytes.fromhex", "00"), "a.pkl"),
        r"builtins\.bytes\.fromhex",
    ),
    Case(
        "pickle asks for Python 2's os.system",
        raw(b"cos\nsystem\n(S'true'\ntR.", "a.pkl"),
        r"asks for os\.system",
    ),
    Case(
        "pickle loads with numpy", pickled(lambda f: Calls(np.load, str(secret(f, "x.npy")))), r"numpy\.load"
    ),
    Case(
        "pickle maps a file with numpy",
        raw(stack_global("numpy", "memmap", "/etc/passwd"), "a.pkl"),
        r"numpy\.memmap",
    ),
    Case("pickle nested in a torch storage", pickled(nested_in_torch), "posix.system"),
    Case("pickle nested in an object array", pickled(object_array), r"posix\.system"),
    Case("pickle nested in a .pt", torch_zip, "posix.system"),
    Case(
        "pickle of torch's own loader in a .pth",
        pickled(lambda f: Calls(torch.load, str(secret(f, "x.pt"))), "a.pth", protocol=2),
        r"torch\.serialization\.load",
    ),
    Case("pickle with a persistent reference", raw(b"\x80\x04\x8c\x01aQ.", "a.pkl"), "persistent"),
    Case("pickle with an extension code", raw(b"\x80\x02\x82\x01.", "a.pkl"), "cannot be read as a pickle"),
    Case(
        "pickle sets attributes of what it calls",
        raw(b"\x80\x04\x8c\x07_codecs\x8c\x06encode\x93N}\x8c\x0c__defaults__K\x01\x85s\x86b.", "a.pkl"),
        "a state of what it calls",
    ),
    Case(
        "pickle of fields past the end of their rows",
        pickled(lambda f: {"inputs": rows_of(np.dtype("f8"), 4096)}),
        "cannot be read as a pickle",
    ),
    Case(
        "pickle of bytes taken for objects",
        pickled(lambda f: {"inputs": rows_of(np.dtype("O"), 0)}),
        "asks for an array",
    ),
    Case(
        "pickle makes an array of nothing",
        raw(stack_global("numpy", "ndarray", (10**9, 4)), "a.pkl"),
        "cannot be read as a pickle|not rebuilt",
    ),
    Case(
        "pickle makes bytes of a number",
        raw(stack_global("builtins", "bytes", 10**10), "a.pkl"),
        "bytes made from something else",
    ),
    Case(
        "pickle repeats a deque",
        pickled(lambda f: {"inputs": collections.deque([1.0] * 4, 2)}),
        "inputs is deque; wanted an array or a list",
    ),
    Case("pickle memo index of 4 billion", raw(b"\x80\x02]r\xff\xff\xff\xff.", "a.pkl"), "memo"),
    Case("pickle memo index as text", raw(b"]p3999999999\n.", "a.pkl"), "memo"),
    Case(
        "pickle declares a bytearray of 64 GB",
        raw(b"\x80\x05\x96" + struct.pack("<Q", 1 << 36) + b"a.", "a.pkl"),
        "cut short",
    ),
    Case(
        "pickle declares a text of 64 GB",
        raw(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 36) + b"a.", "a.pkl"),
        "cut short",
    ),
    Case(
        "pickle declares a frame of 64 GB",
        raw(b"\x80\x04\x95" + struct.pack("<Q", 1 << 36) + b"].", "a.pkl"),
        "cut short",
    ),
    Case("pickle of a billion laughs", pickled(lambda f: billion_laughs()), "repeats its parts"),
    Case(
        "pickle of records of a billion laughs",
        pickled(lambda f: [{"input": billion_laughs()["inputs"], "target": 0}]),
        "repeats its parts",
    ),
    Case(
        "pickle of one long list many times",
        pickled(lambda f: {"inputs": [[1.0] * 10**5] * 10**5}),
        "repeats its parts",
    ),
    Case("pickle of keys that collide", raw(colliding_keys, "a.pkl"), "integers beyond 64 bits"),
    Case("pickle of keys that collide in a .pt", colliding_torch, "integers beyond 64 bits"),
    Case(
        "pickle of qualities in words",
        pickled(lambda f: {"inputs": X, "targets": Y, "quality": ["good"] * 4}),
        "quality holds no plain numbers",
    ),
    Case("pickle of a list in itself", pickled(lambda f: itself()), "holds itself"),
    Case("pickle nested 300,000 deep", raw(deep(300_000), "a.pkl"), "nested deeper"),
    Case("pickle cut short", raw(pickle.dumps({"inputs": X, "targets": Y})[:-40], "a.pkl"), "a.pkl: cannot"),
    Case("pickle of nothing", raw(b"", "a.pkl"), "the file is empty"),
    Case(
        "pickle of records without width",
        pickled(lambda f: {"inputs": np.zeros((10**12, 0), np.float32)}),
        r"\(1000000000000, 0\)",
    ),
    Case(
        "pickle of a quality beyond floats",
        pickled(lambda f: [{"input": [1.0], "target": 0, "metadata": {"quality": q}} for q in (1, 10**400)]),
        "record 1 has a quality beyond",
        {1: "unreadable"},
    ),
    Case("torch tensor that repeats one number", expanded, "repeats its parts"),
    Case("torch file that inflates", torch_bomb, "compressed"),
    Case("torch sparse tensor", sparse, "sparse"),
]

# --- HDF5 ------------------------------------------------------------------------------------------


def hdf5(make: Callable[[h5py.File, Path], None]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        with h5py.File(folder / "a.h5", "w") as file:
            make(file, folder)
        return folder / "a.h5"

    return write


def outside_hdf5(folder: Path) -> Path:
    path = secret(folder, "s.h5")
    with h5py.File(path, "w") as file:
        file["dataset/inputs"], file["dataset/targets"] = X + SECRET, Y
    return path


def linked(where: str, target: str) -> Callable[[Path], Path]:
    def make(file: h5py.File, folder: Path) -> None:
        if where != "dataset":
            file["dataset/targets"] = Y
        file[where] = h5py.ExternalLink(outside_hdf5(folder), target)

    return hdf5(make)


def quality_hdf5(values: Any) -> Callable[[Path], Path]:
    def make(file: h5py.File, folder: Path) -> None:
        file["dataset/inputs"], file["dataset/targets"] = X, Y
        file["dataset/quality"] = values

    return hdf5(make)


def soft_to_external(file: h5py.File, folder: Path) -> None:
    file["hidden"] = h5py.ExternalLink(outside_hdf5(folder), "dataset")
    file["dataset/inputs"] = h5py.SoftLink("/hidden/inputs")


def soft_loop(file: h5py.File, folder: Path) -> None:
    file["dataset/inputs"] = h5py.SoftLink("/dataset/more")
    file["dataset/more"] = h5py.SoftLink("/dataset/inputs")


def external_storage(file: h5py.File, folder: Path) -> None:
    (np.zeros((4, 3), np.float32) + SECRET).tofile(secret(folder, "x.raw"))
    place = [(str(secret(folder, "x.raw")), 0, h5py.h5f.UNLIMITED)]
    file.create_dataset("dataset/inputs", (4, 3), np.float32, external=place)


def virtual(file: h5py.File, folder: Path) -> None:
    layout = h5py.VirtualLayout((4, 3), np.float32)
    layout[:] = h5py.VirtualSource(outside_hdf5(folder), "dataset/inputs", (4, 3))
    file.create_virtual_dataset("dataset/inputs", layout)


def with_filters(*numbers: int, shape: tuple = (4, 3), chunk: tuple = (4, 3)) -> Callable:
    def make(file: h5py.File, folder: Path) -> None:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk(chunk)
        for number in numbers:
            plist.set_filter(number, h5py.h5z.FLAG_OPTIONAL, (9,))
        group = file.create_group("dataset")
        space = h5py.h5s.create_simple(shape)
        made = h5py.h5d.create(group.id, b"inputs", h5py.h5t.IEEE_F32LE, space, plist)
        h5py.Dataset(made)[:] = 1.0

    return hdf5(make)


def gzip_chunk_bomb(file: h5py.File, folder: Path) -> None:
    """A chunk of 4 kB whose stored bytes inflate to 320 MB."""
    data = file.create_dataset("dataset/inputs", (1024, 1), np.float32, chunks=(1024, 1), compression="gzip")
    deflate = zlib.compressobj(9)
    block = bytes(1 << 24)
    stored = b"".join(deflate.compress(block) for _ in range(20)) + deflate.flush()
    data.id.write_direct_chunk((0, 0), stored)


def cut_hdf5(folder: Path) -> Path:
    path = hdf5(lambda f, _: f.update({"dataset/inputs": np.zeros((1000, 10))}))(folder)
    path.write_bytes(path.read_bytes()[:30_000])
    return path


TEXT = b"a" * (2 << 20)


def one_text_in_all_rows(folder: Path, name: str) -> Path:
    """Each row refers to the same 2 MB: their length and place in the heap of the file."""
    path, rows = folder / "a.h5", 1500
    with h5py.File(path, "w") as file:
        texts = file.create_dataset(f"dataset/{name}", (rows,), h5py.string_dtype())
        texts[:] = [TEXT] + [b""] * (rows - 1)
        place = texts.id.get_offset()
        if name != "inputs":
            file["dataset/inputs"] = np.ones((rows, 2), np.float32)
    repeat(path, place, rows)
    return path


def one_text_in_an_attribute(folder: Path) -> Path:
    """The same among the attributes; the only record is bad."""
    path, rows = folder / "a.h5", 4000
    with h5py.File(path, "w") as file:
        file["dataset/inputs"] = np.array([[np.nan]])
        file["dataset"].attrs.create("notes", [TEXT] + [b""] * (rows - 1), dtype=h5py.string_dtype())
    raw = path.read_bytes()
    repeat(path, raw.index(struct.pack("<I", len(TEXT)), raw.index(b"notes")), rows)
    return path


def repeat(path: Path, place: int, rows: int) -> None:
    """Put the 16 bytes at a place of a file there so many times."""
    with path.open("r+b") as file:
        file.seek(place)
        reference = file.read(16)
        file.seek(place)
        file.write(reference * rows)


HDF5 = [
    Case("hdf5 external link to the inputs", linked("dataset/inputs", "dataset/inputs"), "external link"),
    Case("hdf5 external link to the group", linked("dataset", "dataset"), "external link"),
    Case("hdf5 external link behind a soft link", hdf5(soft_to_external), "external link"),
    Case(
        "hdf5 external link to a named target",
        hdf5(
            lambda f, p: f.update(
                {
                    "dataset/inputs": X,
                    "dataset/targets/a": h5py.ExternalLink(outside_hdf5(p), "dataset/targets"),
                }
            )
        ),
        "external link",
    ),
    Case(
        "hdf5 external link to the quality",
        hdf5(
            lambda f, p: f.update(
                {
                    "dataset/inputs": X,
                    "dataset/quality": h5py.ExternalLink(outside_hdf5(p), "dataset/targets"),
                }
            )
        ),
        "external link",
    ),
    Case(
        "hdf5 external link to the metadata",
        hdf5(
            lambda f, p: f.update(
                {"dataset/inputs": X, "dataset/metadata": h5py.ExternalLink(outside_hdf5(p), "dataset")}
            )
        ),
        "external link",
    ),
    Case("hdf5 soft links in a circle", hdf5(soft_loop), "soft links"),
    Case("hdf5 external storage", hdf5(external_storage), "is stored in"),
    Case("hdf5 virtual data set", hdf5(virtual), "virtual data set"),
    Case("hdf5 plug-in filter", with_filters(32015), "plug-in filter 32015"),
    Case("hdf5 filter twice", with_filters(1, 1), "twice"),
    Case("hdf5 chunk that inflates", hdf5(gzip_chunk_bomb), "inflates"),
    Case(
        "hdf5 declares a trillion rows",
        hdf5(lambda f, _: f.create_dataset("dataset/inputs", (10**12, 4), np.float32, chunks=(1024, 4))),
        "declares shape",
    ),
    Case(
        "hdf5 contiguous rows never written",
        hdf5(lambda f, _: f.create_dataset("dataset/inputs", (10**9, 4), np.float32)),
        "declares shape",
    ),
    Case(
        "hdf5 chunks of 8 GB",
        hdf5(
            lambda f, _: f.create_dataset(
                "dataset/inputs", (1, 1 << 29), np.float64, chunks=(1, 1 << 28), fillvalue=1
            )
        ),
        "chunks|declares",
    ),
    Case(
        "hdf5 records without width",
        hdf5(lambda f, _: f.create_dataset("dataset/inputs", (10**12, 0), np.float32)),
        r"\(1000000000000, 0\)",
    ),
    Case(
        "hdf5 text of 1 GB a row",
        hdf5(lambda f, _: f.create_dataset("dataset/inputs", (10**4,), "S1000000000", chunks=(1,))),
        "declares shape|chunks",
    ),
    Case(
        "hdf5 object references",
        hdf5(lambda f, _: f.create_dataset("dataset/inputs", (3,), h5py.ref_dtype)),
        "wanted numbers or strings",
    ),
    Case(
        "hdf5 compound records",
        hdf5(
            lambda f, _: f.create_dataset("dataset/inputs", data=np.zeros(3, [("a", "f4"), ("b", "O")][:1]))
        ),
        "wanted numbers or strings",
    ),
    Case("hdf5 of one text in all rows", lambda f: one_text_in_all_rows(f, "inputs"), "share it"),
    Case("hdf5 of one target in all rows", lambda f: one_text_in_all_rows(f, "targets"), "share it"),
    Case("hdf5 of one text in an attribute", one_text_in_an_attribute, "record 0 has .*NaN|not finite"),
    Case("hdf5 of qualities in words", quality_hdf5(["good"] * 4), "quality holds"),
    Case("hdf5 of two qualities a record", quality_hdf5(np.ones((4, 2))), "quality holds"),
    Case("hdf5 cut short", cut_hdf5, "cannot be opened as HDF5"),
    Case("hdf5 that is none", raw(b"\x89HDF\r\n\x1a\n" + b"\xff" * 500, "a.h5"), "cannot be opened as HDF5"),
]

# --- numpy and safetensors -------------------------------------------------------------------------


def npy(shape: Any, dtype: Any = "<f4", payload: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(header))
    return b"\x93NUMPY" + version + length + header + payload


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "a.npz", "w", method) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return folder / "a.npz"

    return write


def npz_bomb(folder: Path) -> Path:
    rows, path = 1 << 24, folder / "a.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive,
        archive.open("inputs.npy", "w", force_zip64=True) as member,
    ):
        member.write(npy((rows, 4)))
        for _ in range(rows * 16 >> 24):
            member.write(bytes(1 << 24))
    return path


def npz_lies(folder: Path) -> Path:
    """The directory says 4 GB of a stored member whose file holds 200 bytes."""
    path = npz({"inputs.npy": npy((10, 4), payload=bytes(160))})(folder)
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02") + 20
    content[at : at + 8] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    path.write_bytes(content)
    return path


def npz_twice(folder: Path) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(folder / "a.npz", "w") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("inputs.npy", saved(X))
        archive.writestr("inputs.npy", saved(X + 1))
    return folder / "a.npz"


def st_file(header: Any, payload: bytes = b"", name: str = "a.safetensors") -> Callable[[Path], Path]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return raw(struct.pack("<Q", len(text)) + text + payload, name)


def entry(shape: list, span: list, dtype: str = "F32") -> dict:
    return {"inputs": {"dtype": dtype, "shape": shape, "data_offsets": span}}


_TENSOR = b'"inputs":{"dtype":"%s","shape":[2],"data_offsets":[0,8]}'
TWICE = b"{" + _TENSOR % b"F32" + b"," + _TENSOR % b"I32" + b"}"

ARRAYS = [
    Case("npy declares 16 TB", raw(npy((10**12, 4)), "a.npy"), "declares shape"),
    Case("npy shape that overflows", raw(npy((2**62, 2**62, 4)), "a.npy"), "declares shape"),
    Case("npy negative shape", raw(npy((-4, 3)), "a.npy"), "impossible shape"),
    Case("npy shape of True", raw(npy((True, 3), payload=bytes(12)), "a.npy"), "impossible shape|not a .npy"),
    Case("npy records without width", raw(npy((10**12, 0)), "a.npy"), r"\(1000000000000, 0\)"),
    Case("npy of empty texts", raw(npy((10**12,), "<U0"), "a.npy"), "no bytes"),
    Case("npy of empty voids", raw(npy((10**12,), "|V0"), "a.npy"), "no bytes|V0"),
    Case("npy of objects", raw(npy((4,), "|O", b"x" * 32), "a.npy"), "Python objects"),
    Case(
        "npy of objects in a field",
        raw(npy((4,), [("input", "<f4"), ("target", "|O")], bytes(48)), "a.npy"),
        "Python objects",
    ),
    Case(
        "npy pickled payload",
        lambda f: raw(npy((1,), "|O", pickle.dumps(Calls(os.system, touch(f)))), "a.npy")(f),
        "Python objects",
    ),
    Case("npy header that calls", raw(npy("__import__('os').getpid()"), "a.npy"), "not a .npy file"),
    Case("npy header of brackets", raw(npy("(" * 9000), "a.npy"), "not a .npy file"),
    Case("npy header of minus signs", raw(npy("-" * 9000 + "1"), "a.npy"), "not a .npy file"),
    Case("npy header of powers", raw(npy("(9**9**9,)"), "a.npy"), "not a .npy file"),
    Case("npy header of 4 GB", raw(b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", "a.npy"), "not a .npy file"),
    Case(
        "npy header of 10 MB", raw(npy("(4,)" + " " * 10**7, version=b"\x02\x00"), "a.npy"), "not a .npy file"
    ),
    Case("npy cut short", raw(saved(X)[:-5], "a.npy"), "declares shape"),
    Case("npy with more behind", raw(saved(X) + b"more", "a.npy"), "declares shape"),
    Case(
        "npy with targets outside",
        lambda f: beside(f, "a_targets.npy", saved(np.full(4, SECRET))),
        "leads out of",
    ),
    Case("npz that inflates", npz_bomb, "inflates"),
    Case("npz that lies about its size", npz_lies, "a.npz"),
    Case("npz with a member twice", npz_twice, "twice"),
    Case("npz with a member outside", npz({"../../inputs.npy": saved(X)}), "wanted an array named 'inputs'"),
    Case(
        "npz of objects",
        lambda f: npz({"inputs.npy": npy((1,), "|O", pickle.dumps(Calls(os.system, touch(f))))})(f),
        "Python objects",
    ),
    Case("npz packed with LZMA", npz({"inputs.npy": saved(X)}, zipfile.ZIP_LZMA), "method"),
    Case(
        "npz of 30,000 members",
        npz({f"m{i}.npy": b"" for i in range(30_000)}),
        "wanted an array named 'inputs'",
    ),
    Case("npz declares 40 GB", npz({"inputs.npy": npy((10**10,))}), "declares shape"),
    Case(
        "safetensors header of 8 EB",
        raw(struct.pack("<Q", 1 << 63) + b"{}", "a.safetensors"),
        "not a readable",
    ),
    Case(
        "safetensors span past the end", st_file(entry([1 << 30], [0, 1 << 32]), bytes(8)), "not a readable"
    ),
    Case("safetensors shape beyond its span", st_file(entry([1 << 30], [0, 8]), bytes(8)), "not a readable"),
    Case(
        "safetensors shape that overflows",
        st_file(entry([1 << 62, 1 << 62], [0, 8]), bytes(8)),
        "not a reada",
    ),
    Case(
        "safetensors spans that overlap",
        st_file(entry([2], [0, 8]) | {"targets": entry([2], [0, 8])["inputs"]}, bytes(8)),
        "not a readable",
    ),
    Case("safetensors with a gap", st_file(entry([2], [8, 16]), bytes(16)), "not a readable"),
    Case("safetensors tensor twice", st_file(TWICE, bytes(8)), "not a readable|twice"),
    Case("safetensors records without width", st_file(entry([10**12, 0], [0, 0])), r"\(1000000000000, 0\)"),
    Case(
        "safetensors header nested deep",
        st_file(b'{"__metadata__":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
        "not a readable",
    ),
    Case(
        "safetensors cut short",
        raw(safetensors.numpy.save({"inputs": X})[:-5], "a.safetensors"),
        "not a reada",
    ),
]

# --- tokens, text, folders --------------------------------------------------------------------------


def beside(folder: Path, name: str, content: bytes) -> Path:
    """A .npy or .bin whose companion is a link to a file outside."""
    secret(folder, name).write_bytes(content)
    (folder / name).symlink_to(secret(folder, name))
    if name.endswith(".npy"):
        (folder / "a.npy").write_bytes(saved(X))
    else:
        (folder / "a.bin").write_bytes(bytes(2000))
    return folder


def tokens(sidecar: bytes, content: bytes = bytes(2000)) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "a.bin.json").write_bytes(sidecar)
        return raw(content, "a.bin")(folder)

    return write


def link_out(folder: Path) -> Path:
    secret(folder, "s.jsonl").write_text(json.dumps({"input": [SECRET], "target": 0}) + "\n")
    (folder / "a.jsonl").symlink_to(secret(folder, "s.jsonl"))
    return folder


def folder_link_out(folder: Path) -> Path:
    link_out(folder)
    (folder / "a.jsonl").unlink()
    (folder / "inner").symlink_to(folder.parent / "secret")
    return folder


def link_loops(folder: Path) -> str:
    (folder / "a.jsonl").write_text("not json\n")
    for name in ("p", "q", "r"):
        (folder / name).symlink_to(folder)
    return str(folder / "**" / "*.jsonl")


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "a.jsonl")
    return folder / "a.jsonl"


def device(folder: Path) -> Path:
    (folder / "a.txt").symlink_to("/dev/zero")
    return folder / "a.txt"


PLACES = [
    Case("folder with a link out of it", link_out, "leads out of the data folder"),
    Case(
        "folder with a folder linked from outside",
        folder_link_out,
        "leads out of the data folder|no data file",
    ),
    Case("pattern through links in a circle", link_loops, "not valid JSON"),
    Case("pipe instead of a file", pipe, "no such file|not a file"),
    Case("device instead of a file", device, "no such file|not a file"),
    Case(
        "tokens with a sidecar outside",
        lambda f: beside(f, "a.bin.json", b'{"dtype": "uint8", "vocab_size": 4242}'),
        "leads out of",
    ),
    Case("tokens without a sidecar", raw(bytes(2000), "a.bin"), "has no sidecar"),
    Case("tokens of a foreign type", tokens(b'{"dtype": "O", "vocab_size": 9}'), "dtype is 'O'"),
    Case("tokens with a deep sidecar", tokens(b"[" * 10**4), "not valid JSON"),
    Case("tokens with a sidecar of 100 MB", tokens(b'{"dtype": "uint8"' + b" " * 10**8), "sidecar"),
    Case(
        "tokens of a vocabulary of 10^18",
        tokens(b'{"dtype": "uint8", "vocab_size": 1000000000000000000}'),
        "vocab_size is 1000000000000000000",
    ),
    Case(
        "tokens beyond the vocabulary",
        tokens(b'{"dtype": "uint8", "vocab_size": 9}', b"\x09" * 2000),
        "token 9",
    ),
    Case(
        "tokens cut in the middle",
        tokens(b'{"dtype": "uint16", "vocab_size": 9}', bytes(2001)),
        "no whole number",
    ),
]

# --- JSON ------------------------------------------------------------------------------------------

GOOD = b'{"input": [1.0, 2.0], "target": 1}'


def lines(bad: Callable[[], bytes], end: bytes = b"\n") -> Callable[[Path], Path]:
    """JSON Lines: a good record, the bad one, a good record, and ``end``."""
    return raw(lambda: b"\n".join([GOOD, bad(), GOOD]) + end, "a.jsonl")


def array(bad: Callable[[], bytes]) -> Callable[[Path], Path]:
    return raw(lambda: b'{"samples": [' + b",\n".join([GOOD, bad(), GOOD]) + b"]}", "a.json")


def record(value: bytes, target: bytes = b"1") -> bytes:
    return b'{"input": [' + value + b', 2.0], "target": ' + target + b"}"


# A record that is bad, what is said about it, and the reason it is counted under.
RECORDS: list[tuple[str, Callable[[], bytes], str, str]] = [
    (
        "nested 100,000 deep",
        lambda: record(b"[" * 10**5 + b"]" * 10**5),
        "nested deeper than 64|depth limit",
        "unreadable",
    ),
    (
        "nested 100 deep",
        lambda: record(b"[" * 100 + b"]" * 100),
        "nested deeper than 64|depth limit",
        "unreadable",
    ),
    (
        "deep and never closed",
        lambda: b'{"input": ' + b"[" * 10**6,
        "not valid JSON|cut off",
        "unreadable",
    ),
    ("a number of a million digits", lambda: record(b"1" * 10**6), "not valid JSON", "unreadable"),
    ("an integer of 20 digits", lambda: record(b"1" * 20), "an integer beyond 64", "unreadable"),
    ("a number beyond floats", lambda: record(b"1e999"), "NaN or infinity|not valid", "nonfinite|unreadable"),
    ("a number beyond float32", lambda: record(b"1e39"), "NaN or infinity", "nonfinite"),
    ("NaN", lambda: record(b"NaN"), "not valid JSON", "unreadable"),
    ("minus infinity", lambda: record(b"-Infinity"), "not valid JSON", "unreadable"),
    ("a key twice", lambda: b'{"input": [1.0, 2.0], "target": 1, "target": 2}', "key .*twice", "unreadable"),
    (
        "a key twice, once escaped",
        lambda: b'{"input": [1.0, 2.0], "target": 1, "t\\u0061rget": 2}',
        "key .*twice",
        "unreadable",
    ),
    (
        "a key twice inside",
        lambda: b'{"input": [1.0, 2.0], "target": 1, "metadata": {"quality": 1, "quality": 0}}',
        "key .*twice",
        "unreadable",
    ),
    (
        "bad UTF-8",
        lambda: b'{"input": [1.0, 2.0], "target": 1, "n": "\xff\xfe"}',
        "not valid JSON",
        "unreadable",
    ),
    (
        "overlong UTF-8",
        lambda: b'{"input": [1.0, 2.0], "target": 1, "n": "\xc0\xaf"}',
        "not valid JSON",
        "unreadable",
    ),
    (
        "a lone surrogate",
        lambda: b'{"input": [1.0, 2.0], "target": 1, "n": "\\ud800"}',
        "not valid JSON",
        "unreadable",
    ),
    ("a NUL", lambda: b'{"input": [1.0, 2.0], "target": \x001}', "not valid JSON", "unreadable"),
    (
        "control characters in text",
        lambda: b'{"input": [1.0, 2.0], "target": 1, "n": "\x1b[2J"}',
        "not valid",
        "unreadable",
    ),
    ("cut in the middle", lambda: GOOD[:20], "not valid JSON|cut off", "unreadable"),
    ("two records in one place", lambda: GOOD + GOOD, "not valid JSON", "unreadable"),
    ("a comment", lambda: b"// " + GOOD, "not valid JSON", "unreadable"),
    (
        "a record of 80 MB",
        lambda: record(b"1.0," * 20_000_000 + b"1.0"),
        "is 80 MB long|a record of more than",
        "unreadable",
    ),
    ("another shape", lambda: record(b"1.0, 1.0"), "shape", "shape"),
    ("a table for a row", lambda: record(b"[1.0], [1.0]"), "lists of different|shape", "unreadable|shape"),
    ("text among numbers", lambda: record(b'"1"'), "text among numbers", "unreadable"),
    ("null among numbers", lambda: record(b"null"), "null", "unreadable"),
    ("a label below 0", lambda: record(b"1.0", b"-7"), "number the classes from 0", "label"),
    ("a label of 10^15", lambda: record(b"1.0", b"1000000000000000"), "more than 1048576 classes", "label"),
    ("no input", lambda: b'{"target": 1}', "has no 'input'", "unreadable"),
    ("no record", lambda: b"7", "not an object|not valid JSON", "unreadable"),
    ("a key of 1 MB", lambda: b'{"' + b"k" * 10**6 + b'": 1}', "has no 'input'", "unreadable"),
    (
        "a quality beyond floats",
        lambda: b'{"input": [1.0, 2.0], "target": 1, "quality": 1e999}',
        "quality|not valid",
        "unreadable",
    ),
]
# In a list these leave no place where the next record certainly begins, so the file is refused.
BREAKS_THE_LIST = {
    "two records in one place", "a comment", "no record", "a record of 80 MB", "cut in the middle",
}  # fmt: skip

JSON = [
    *(
        Case(f"json lines with {name}", lines(text), said, {1: reason})
        for name, text, said, reason in RECORDS
    ),
    *(
        Case(f"json with {name}", array(text), said, None if name in BREAKS_THE_LIST else {1: reason})
        for name, text, said, reason in RECORDS
    ),
    Case(
        "json lines cut in the last record",
        lines(lambda: GOOD, end=b"\n" + GOOD[:20]),
        "byte 105",
        {3: "unreadable"},
    ),
    Case(
        "json lines in UTF-16", raw(("\n".join([GOOD.decode()] * 3)).encode("utf-16"), "a.jsonl"), "not valid"
    ),
    Case("json lines of NULs", raw(bytes(10**6), "a.jsonl"), "not valid JSON"),
    Case("json lines of blank lines", raw(b"\n" * 10**6, "a.jsonl"), "no records"),
    Case("json lines that are all bad", raw(b"{\n" * 10**6, "a.jsonl"), "not valid JSON"),
    Case(
        "json cut in the middle",
        raw(b'{"samples": [' + GOOD + b", " + GOOD[:20], "a.json"),
        "byte 49.* is cut off",
        {1: "unreadable"},
    ),
    Case(
        "json of millions of empty records",
        raw(lambda: b"[" + b"{}," * 3_000_000 + b"{}]", "a.json"),
        "no 'input'",
    ),
    Case(
        "json of millions of numbers",
        raw(lambda: b"[" + b"1," * 6_000_000 + b"1]", "a.json"),
        "not valid JSON",
    ),
    Case(
        "json of millions of empty objects in a column",
        raw(lambda: b'{"inputs": [' + b"{}," * 3_000_000 + b"{}]}", "a.json"),
        "objects and no list of records|no records",
    ),
    Case(
        "json of millions of nothings in a column",
        raw(lambda: b'{"inputs": [' + b"null," * 2_500_000 + b"null]}", "a.json"),
        "inputs row 0 has null|no records",
    ),
    Case(
        "json of millions of empty lists in a column",
        raw(lambda: b'{"inputs": [' + b"[]," * 3_000_000 + b"[]]}", "a.json"),
        "has nothing in its input|no records",
    ),
    Case("json of brackets", raw(b"[" * 10**6, "a.json"), "cut off|not valid JSON"),
    Case("json of open objects", raw(b'{"samples":' * 10**5, "a.json"), "no records|not valid JSON"),
    Case("json of blanks", raw(lambda: b" " * 10**7, "a.json"), "empty|no records"),
    Case("json with samples twice", raw(b'{"samples": [' + GOOD + b'], "samples": []}', "a.json"), "twice"),
    Case("json of a million-digit number", raw(b"1" * 10**6, "a.json"), "wanted|not valid JSON"),
]

# --- compressed text and tables ------------------------------------------------------------------------


def zst(content: Callable[[], bytes], **parameters: int) -> Callable[[], bytes]:
    def make() -> bytes:
        import zstandard

        settings = zstandard.ZstdCompressionParameters(**parameters)
        return zstandard.ZstdCompressor(compression_params=settings).compress(content())

    return make


def table(write: Callable[[Any, Path], None], name: str) -> Callable[[Path], Path]:
    """A file that ``write`` makes of a pyarrow table of good records."""

    def made(folder: Path) -> Path:
        import pyarrow as pa

        write(pa.table({"input": [[1.0, 2.0]] * 8, "target": [1] * 8}), folder / name)
        return folder / name

    return made


def parquet(made: Any, path: Path) -> None:
    from pyarrow import parquet as pq

    pq.write_table(made, path)


def parquet_of_a_constant(folder: Path) -> Path:
    import pyarrow as pa
    from pyarrow import parquet as pq

    rows = 1 << 26
    column = pa.array(np.zeros(rows, np.int8)).cast(pa.int64())
    made = pa.table({"input": column, "target": column})
    pq.write_table(made, folder / "a.parquet", row_group_size=rows, compression="gzip")
    return folder / "a.parquet"


def parquet_elsewhere(folder: Path) -> Path:
    """Only the footer of a table; its columns are said to lie in another file."""
    import pyarrow as pa
    from pyarrow import parquet as pq

    collected: list[Any] = []
    outside = secret(folder, "x.parquet")
    pq.write_table(
        pa.table({"input": [[float(SECRET)]] * 8, "target": [1] * 8}), outside, metadata_collector=collected
    )
    collected[0].set_file_path("../secret/x.parquet")
    collected[0].write_metadata_file(str(folder / "a.parquet"))
    return folder / "a.parquet"


def arrow(made: Any, path: Path) -> None:
    from pyarrow import ipc

    with ipc.new_file(path, made.schema) as file:
        file.write_table(made)


def stream(made: Any, path: Path) -> None:
    from pyarrow import ipc

    with ipc.new_stream(path, made.schema) as file:
        file.write_table(made)


def arrow_of_nothing(rows: int, made: str) -> Callable[[Path], Path]:
    """A column without a buffer, of any number of rows."""

    def write(folder: Path) -> Path:
        import pyarrow as pa

        if made == "nulls":
            column = pa.nulls(rows)
        else:
            nothing = pa.array([], pa.float32())
            column = pa.Array.from_buffers(pa.list_(pa.float32(), 0), rows, [None], children=[nothing])
        (stream if made == "stream" else arrow)(pa.table({"input": column}), folder / "a.arrow")
        return folder / "a.arrow"

    return write


def arrow_bomb(opened: str) -> Callable[[Path], Path]:
    """20 kB of zeros, packed with zstd, that become 512 MB."""

    def write(folder: Path) -> Path:
        import pyarrow as pa
        from pyarrow import ipc

        made = pa.table({"input": pa.array(np.zeros(1 << 26))})
        packed = ipc.IpcWriteOptions(compression="zstd")
        with getattr(ipc, opened)(folder / "a.arrow", made.schema, options=packed) as file:
            file.write_table(made)
        return folder / "a.arrow"

    return write


def one_text_many_times() -> Any:
    """A table of 20,000 texts of 200 kB, which are one."""
    import pyarrow as pa

    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(20_000, np.int32)), pa.array(["x" * 200_000]))
    return pa.table({"input": text, "target": [1] * 20_000})


def repeated(write: Callable[[Any, Path], None], name: str) -> Callable[[Path], Path]:
    def made(folder: Path) -> Path:
        write(one_text_many_times(), folder / name)
        return folder / name

    return made


def list_of_zeros(folder: Path) -> Path:
    """A Parquet file of one record of 10^8 zeros."""
    import pyarrow as pa
    from pyarrow import parquet as pq

    rows = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(10**8, np.int8)), 10**8)
    pq.write_table(pa.table({"input": rows.cast(pa.list_(pa.int8()))}), folder / "a.parquet")
    return folder / "a.parquet"


def cut_short(write: Callable[[Path], Path], keep: int) -> Callable[[Path], Path]:
    def made(folder: Path) -> Path:
        path = write(folder)
        path.write_bytes(path.read_bytes()[:keep])
        return path

    return made


SOME = b"\n".join([GOOD] * 1000)
TABLES = [
    Case("gzip cut short", raw(lambda: gzip.compress(SOME)[:-30], "a.jsonl.gz"), "damaged or cut short"),
    Case(
        "gzip with a wrong checksum",
        raw(lambda: gzip.compress(SOME)[:-8] + bytes(8), "a.jsonl.gz"),
        "damaged or cut short",
    ),
    Case("gzip that is none", raw(SOME, "a.jsonl.gz"), "damaged or cut short"),
    Case("gzip within gzip", raw(lambda: gzip.compress(gzip.compress(SOME)), "a.jsonl.gz"), "not valid JSON"),
    Case("gzip of blank lines", raw(lambda: gzip.compress(b"\n" * (1 << 27)), "a.jsonl.gz"), "no records"),
    Case(
        "gzip of one line without end",
        raw(lambda: gzip.compress(GOOD + b"\n" + b" " * (1 << 28)), "a.jsonl.gz"),
        "is 268 MB long",
        {1: "unreadable"},
    ),
    Case("zstd cut short", raw(lambda: zst(lambda: SOME)()[:-20], "a.jsonl.zst"), "damaged or cut short"),
    Case("zstd that inflates", raw(zst(lambda: b"\n" * (1 << 28)), "a.jsonl.zst"), "grows to more than"),
    Case(
        "zstd with a window of 2 GB",
        raw(b"\x28\xb5\x2f\xfd\x00\xa8" + b"\x00" * 100, "a.jsonl.zst"),
        "damaged or cut short",
    ),
    Case("parquet cut short", cut_short(table(parquet, "a.parquet"), -50), "cannot be read"),
    Case("parquet that is none", raw(b"PAR1" + b"\xff" * 200 + b"PAR1", "a.parquet"), "cannot be read"),
    Case("parquet of a constant", parquet_of_a_constant, "inflates"),
    Case("parquet with columns elsewhere", parquet_elsewhere, "cannot be read"),
    Case("arrow cut short", cut_short(table(arrow, "a.arrow"), -50), "cannot be read"),
    Case("arrow that is none", raw(b"ARROW1\0\0" + b"\xff" * 200, "a.arrow"), "cannot be read"),
    Case("arrow packed zeros", arrow_bomb("new_file"), "inflates"),
    Case("arrow stream of packed zeros", arrow_bomb("new_stream"), "inflates"),
    Case("arrow of a billion nulls", arrow_of_nothing(10**9, "nulls"), "inflates"),
    Case("arrow of a billion empty lists", arrow_of_nothing(10**9, "lists"), "inflates"),
    Case("arrow stream of a billion empty lists", arrow_of_nothing(10**9, "stream"), "inflates"),
    Case("arrow stream cut short", cut_short(table(stream, "a.arrow"), 300), "cannot be read"),
    Case("arrow of one text 20,000 times", repeated(arrow, "a.arrow"), "inflates"),
    Case("parquet of one text 20,000 times", repeated(parquet, "a.parquet"), "inflates"),
    Case("parquet of one record of zeros", list_of_zeros, "inflates"),
    Case("csv with rows of other lengths", raw(b"input,target\n1,0\n1,2,3\n", "a.csv"), "cannot be read"),
    Case(
        "csv with a quote that never ends", raw(b'input,target\n"1,0\n' + b"2,0\n" * 10**6, "a.csv"), "cannot"
    ),
    Case("csv of one value of 40 MB", raw(lambda: b"input,target\n" + b"1" * 40_000_000, "a.csv"), "cannot"),
    Case("csv of NULs", raw(bytes(10**6), "a.csv"), "a.csv"),
    Case("csv in UTF-16", raw("input,target\n1,0\n".encode("utf-16"), "a.csv"), "a.csv"),
]

CASES = [*PICKLE, *HDF5, *ARRAYS, *PLACES, *JSON, *TABLES]
