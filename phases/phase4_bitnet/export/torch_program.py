"""torch: a program that `torch.export.load` runs without this package.

    program = torch.export.load("model.pt2").module()
    logits = program(tokens)

Codes are kept four a byte and unpacked in each forward: a small file that runs on any device, not a fast
one. The products are of float32 and exact all the same: sums of int8 times {-1, 0, 1} stay whole numbers
below 2**24.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase4_bitnet.export.portable import dynamic_dimensions, portable_model
from phase4_bitnet.export.report import ExportReport, make_report, new_file
from phase4_bitnet.export.samples import longest_input, outputs_of, sample_for
from phase4_bitnet.layers import BitLinear
from phase4_bitnet.store import unwrap

# Longest row whose sum of int8 times a code float32 holds exactly.
EXACT_INNER = 2**24 // 127


def export_torch(
    model: nn.Module, file: str | Path, *, sample: Tensor | None = None, overwrite: bool = False
) -> ExportReport:
    """Write a model as a program of torch, which needs nothing but torch to run.

    Args:
        model: any module that takes one tensor, gives one (or has .logits), and can be traced.
        file: where to write, as "model.pt2".
        sample: as for `export_onnx`.
        overwrite: replace a file of that name.

    Returns:
        Size and the largest difference.

    Raises:
        ValueError: the model cannot be traced, or has rows too long for exact products.
        FileExistsError: the file exists and `overwrite` is False.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(BitLinear(64, 10))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = export_torch(model, f"{folder}/model.pt2", sample=torch.randn(2, 64)).path
        ...     program = torch.export.load(path).module()
        >>> program(torch.zeros(5, 64)).shape
        torch.Size([5, 10])
    """
    path, model = Path(file), unwrap(model)
    for name, layer in model.named_modules():
        if isinstance(layer, BitLinear) and layer.in_features > EXACT_INNER:
            raise ValueError(
                f"{name}: rows of {layer.in_features} weights, and the program's float32 sums are exact for "
                f"rows of up to {EXACT_INNER}; use the format onnx, which sums in int32"
            )
    sample = (sample_for(model) if sample is None else sample).cpu()
    traced = portable_model(model, _exact_product, packed=True)
    free = dynamic_dimensions(sample, longest_input(model))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(traced, (sample,), dynamic_shapes=free)
    except Exception as error:  # whatever tracing meets in a module of the user's
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the model cannot be traced: {type(error).__name__}: {reason}") from error
    for (
        node
    ) in program.graph.nodes:  # which line of which file it comes from: nobody's business, and most bytes
        node.meta.pop("stack_trace", None)
    with new_file(path, overwrite) as temporary:
        torch.export.save(program, temporary)
        with torch.no_grad():
            theirs = torch.export.load(temporary).module()(sample)
        outputs = outputs_of(model, sample), theirs
    return make_report("torch", path, model, f"torch {torch.__version__}", outputs)


def _exact_product(rows: Tensor, codes: Tensor) -> Tensor:
    return F.linear(rows.float(), codes.float())
