"""Tensors as safetensors files, in pieces."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def tensor_file(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The pieces of a safetensors file, so that it is hashed and written without another copy in memory.

    Args:
        tensors: on the CPU, contiguous, of :data:`DTYPES`.
        metadata: the file's own.

    Example:
        >>> pieces = [bytes(piece) for piece in tensor_file({"a": torch.tensor([1, 2], dtype=torch.uint8)})]
        >>> pieces[0][8:].rstrip(), list(pieces[1])
        (b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}', [1, 2])

    Source: https://github.com/huggingface/safetensors, section Format.
    """
    # Large elements first, so that all are aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, tensor in ordered:
        place = [start, start + tensor.nbytes]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        start = place[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        yield tensor.reshape(-1).view(torch.uint8).numpy().data
