"""Exporters: a trained model in the files of other tools, read back by the tool where it is installed."""

from phase4_bitnet.export.gguf import export_gguf
from phase4_bitnet.export.huggingface import export_huggingface, load_huggingface
from phase4_bitnet.export.onnx import export_onnx
from phase4_bitnet.export.report import ExportReport
from phase4_bitnet.export.torch_program import export_torch

__all__ = [
    "ExportReport",
    "export_gguf",
    "export_huggingface",
    "export_onnx",
    "export_torch",
    "load_huggingface",
]
