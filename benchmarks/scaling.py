"""Bytes that a rank keeps and sends, for ternary decoders far larger than this machine.

    python benchmarks/scaling.py

The decoder is built without memory (torch's meta device) and divided by the code that trains it, in a process
group that has the wanted number of ranks and talks to nobody (torch's fake backend). What is counted are the
rows that this rank is left with and what it would hand to the collectives; activations are not counted.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from interleave import circumstances, write_rows
from phase4_bitnet import build_model, ternary_layers
from phase5_training.config import TrainingConfig
from phase5_training.distributed import Ranks
from phase5_training.sharded import BYTES_A_WEIGHT, MOST_GATHERED, blocks_of, codes_travel, local_part, shard

SIZES = {
    "100M": {"dim": 768, "layers": 9, "heads": 12},
    "1B": {"dim": 2048, "layers": 17, "heads": 16},
    "7B": {"dim": 4096, "layers": 33, "heads": 32},
}
RANKS = (8, 64, 512)
STATE = 4 + 4 + 8 + 4  # bytes of latent, gradient, AdamW's moments and the slow average, of a weight


class Pretended(Ranks):
    """The first of many ranks that are not there."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.world_size = world_size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    print(
        "model  ranks | GB a rank: ddp  fsdp | MB a step and rank: gather 2-bit  float | reduce float  bf16"
    )
    for name in options.sizes:
        for ranks in RANKS:
            row = {"model": name, "ranks": ranks, **count(SIZES[name], ranks)}
            rows.append(row)
            print(
                f"{name:5}  {ranks:5} | {row['ddp_bytes'] / 1e9:8.2f} {row['fsdp_bytes'] / 1e9:8.3f} | "
                f"{row['gathered_codes'] / 1e6:10.0f} {row['gathered_float'] / 1e6:8.0f} | "
                f"{row['reduced_float'] / 1e6:8.0f} {row['reduced_float'] / 2e6:8.0f}"
            )
    if options.output:
        write_rows(options.output, [{**row, **circumstances()} for row in rows])


def count(size: dict[str, int], ranks: int) -> dict[str, Any]:
    """Bytes of one model on so many ranks."""
    with torch.device("meta"):
        model = build_model("decoder", vocab_size=32000, max_length=2048, **size)
    weights = sum(p.numel() for p in model.parameters())
    ternary = sum(layer.weight.numel() for _, layer in ternary_layers(model))
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        pretended = Pretended(ranks)
        shard(model, TrainingConfig(), pretended, torch.device("cpu"))
        own = sum(local_part(p).numel() for p in model.parameters() if isinstance(p, DTensor))
        coded = [layer for _, layer in ternary_layers(model) if codes_travel(layer)]
        codes = sum(layer.codes.numel() + layer.packed_codes.numel() for layer in coded)  # type: ignore[operator]
        blocks = sum(gathered_once(block, ranks) for block in blocks_of(model))
        whole = gathered_once(model, ranks)
        stay = blocks <= MOST_GATHERED * BYTES_A_WEIGHT * weights / ranks
        blocks_float = 4 * sum(p.numel() for block in blocks_of(model) for p in block.parameters())
    finally:
        dist.destroy_process_group()
    # Blocks that do not stay are gathered again for the backward; a rank receives all parts but its own.
    others = (ranks - 1) / ranks
    return {
        "weights": weights,
        "ternary": ternary,
        "ddp_bytes": weights * STATE + ternary,
        "fsdp_bytes": own * STATE + codes,
        "gathered_codes": others * (whole + (0 if stay else blocks)),
        "gathered_float": others * (4 * weights + blocks_float),
        "reduced_float": others * 4 * weights,
    }


def gathered_once(module: nn.Module, ranks: int) -> int:
    """Bytes of all parts of a module's weights, as they travel."""
    coded = [layer for _, layer in ternary_layers(module) if codes_travel(layer)]
    packed = ranks * sum(layer.packed_codes.numel() for layer in coded)  # type: ignore[operator]
    floats = sum(p.numel() for p in module.parameters()) - sum(layer.weight.numel() for layer in coded)
    return packed + 4 * floats


if __name__ == "__main__":
    main()
