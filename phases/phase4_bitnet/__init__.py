"""What a 1.58-bit model is: layers, packing, inference, reference architectures, the session store."""

from phase4_bitnet.architectures import build_model
from phase4_bitnet.convert import convert_model_to_bitnet
from phase4_bitnet.inference import (
    PackedBitConv1d,
    PackedBitConv2d,
    PackedBitEmbedding,
    PackedBitLinear,
    load_packed_model,
    pack_model,
)
from phase4_bitnet.layers import BitConv1d, BitConv2d, BitEmbedding, BitLinear, ternary_layers
from phase4_bitnet.store import load_compressed_model, load_session, save_compressed_model

__all__ = [
    "BitConv1d",
    "BitConv2d",
    "BitEmbedding",
    "BitLinear",
    "PackedBitConv1d",
    "PackedBitConv2d",
    "PackedBitEmbedding",
    "PackedBitLinear",
    "build_model",
    "convert_model_to_bitnet",
    "load_compressed_model",
    "load_packed_model",
    "load_session",
    "pack_model",
    "save_compressed_model",
    "ternary_layers",
]
