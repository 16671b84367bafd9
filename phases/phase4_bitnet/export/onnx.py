"""ONNX: a graph with products of int8, for onnxruntime and others.

torch traces the model and writes the graph. A ternary linear layer becomes MatMulInteger of int8 rows and
int8 codes, with the rows' scale computed in the graph: DynamicQuantizeLinear would not do, it has one scale
for all rows and a zero point.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, library, nn

from phase4_bitnet.export.libraries import optional, required, version_of
from phase4_bitnet.export.portable import dynamic_dimensions, portable_model
from phase4_bitnet.export.report import ExportReport, make_report, new_file
from phase4_bitnet.export.samples import longest_input, outputs_of, sample_for
from phase4_bitnet.int8_matmul import int8_matmul
from phase4_bitnet.store import unwrap

OPSET = 18
INPUT, OUTPUT = "input", "output"


def export_onnx(
    model: nn.Module, file: str | Path, *, sample: Tensor | None = None, overwrite: bool = False
) -> ExportReport:
    """Write a model as an ONNX file with int8 products.

    Codes take a byte each in the file.

    Args:
        model: any module that takes one tensor, gives one (or has .logits), and can be traced.
        file: where to write, as "model.onnx".
        sample: an input of two rows or more, which tracing follows; a reference architecture needs none.
            Rows may be more or fewer later, and so may tokens.
        overwrite: replace a file of that name.

    Returns:
        Size and the largest difference, where onnxruntime is installed.

    Raises:
        ValueError: onnx or onnxscript is missing, or the model cannot be traced.
        FileExistsError: the file exists and `overwrite` is False.

    Example:
        >>> import tempfile
        >>> from phase4_bitnet import build_model
        >>> model = build_model("mlp", in_features=64, hidden=(128,), num_outputs=10)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = export_onnx(model, f"{folder}/model.onnx")
        >>> report.largest_difference < 1e-4
        True
    """
    required("onnx", "onnx", "onnx")
    required("onnxscript", "onnx", "onnx")
    path, model = Path(file), unwrap(model)
    sample = (sample_for(model) if sample is None else sample).cpu()
    traced = portable_model(model, torch.ops.forge.int8_product, packed=False)
    with new_file(path, overwrite) as temporary:
        _write(traced, sample, longest_input(model), temporary)
        outputs = None
        if optional("onnxruntime") is not None:
            outputs = outputs_of(model, sample), _run(temporary, sample)
    return make_report("onnx", path, model, version_of("onnxruntime") if outputs else None, outputs)


def _write(model: nn.Module, sample: Tensor, longest: int | None, path: Path) -> None:
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                model,
                (sample,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=dynamic_dimensions(sample, longest),
                custom_translation_table={torch.ops.forge.int8_product.default: _translation()},
                verbose=False,
            )
    except Exception as error:  # whatever tracing meets in a module of the user's
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the model cannot be traced to ONNX: {type(error).__name__}: {reason}; export the part that "
            "takes one tensor and gives one"
        ) from error
    # torch notes for every node which line of which file it comes from: nobody's business, and most of the
    # bytes.
    for part in (program.model, *program.model.functions.values()):
        part.metadata_props.clear()
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    program.save(path, external_data=False)


def _translation() -> Any:
    """forge::int8_product in operators of ONNX."""
    import onnxscript

    op = onnxscript.values.Opset("", OPSET)

    def int8_product(rows: Any, codes: Any) -> Any:
        product = op.MatMulInteger(rows, op.Transpose(codes, perm=[1, 0]))
        return op.Cast(product, to=1)  # float32

    return int8_product


def _run(path: Path, sample: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([OUTPUT], {INPUT: sample.numpy()})[0])


@contextlib.contextmanager
def _quiet() -> Any:
    """Without what torch prints while it traces."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


library.define("forge::int8_product", "(Tensor rows, Tensor codes) -> Tensor")


@library.impl("forge::int8_product", "cpu")
def _int8_product(rows: Tensor, codes: Tensor) -> Tensor:
    """(..., k) and (n, k) int8 to (..., n) float32."""
    flat = int8_matmul(rows.reshape(-1, rows.shape[-1]), codes.t())
    return flat.float().reshape(*rows.shape[:-1], codes.shape[0])


@library.register_fake("forge::int8_product")
def _int8_product_fake(rows: Tensor, codes: Tensor) -> Tensor:
    return rows.new_empty((*rows.shape[:-1], codes.shape[0]), dtype=torch.float32)
