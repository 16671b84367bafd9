"""Inference: packed ternary layers against float ones, a layer at a time and the whole decoder on one token.

    python benchmarks/bench_inference.py [--threads N] [--out FILE]

The cases take turns (A B C D A B C D ...) and ratios are taken within a round. Layers are timed in one
process; each decoder lives in one of its own, because torch.compile's guards of one model cost the next. A
turn repeats the call for a few milliseconds; no_grad, random weights. Cases:

    float32   nn.Linear
    bf16      nn.Linear with weight and input in bf16
    training  BitLinear as it stands under BitNetOptimizer: int8 codes, latents kept
    packed    pack_model of that
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from interleave import CaseError, Worker, quartiles, ratio_quartiles, timing_circumstances, write_rows
from phase4_bitnet import BitLinear, build_model, pack_model, save_compressed_model, ternary_layers

CASES = ("float32", "bf16", "training", "packed")
ROWS = (1, 8, 64, 512)
WIDTHS = (128, 384, 768, 1536, 4096)
DECODERS = (384, 768, 1536)
LAYERS = 4
VOCABULARY = 256
TURN_SECONDS = 4e-3
RECORD = Path(__file__).parent / "records" / "inference.jsonl"


def own_codes(model: nn.Module) -> nn.Module:
    """Mark the codes as current, as BitNetOptimizer does: no forward derives them again."""
    for _, layer in ternary_layers(model):
        layer.codes_are_current = True
    return model


def linear(case: str, width: int) -> nn.Module:
    """Build one layer of a case."""
    if case in ("float32", "bf16"):
        dtype = torch.bfloat16 if case == "bf16" else torch.float32
        return nn.Linear(width, width, bias=False, dtype=dtype)
    layer = own_codes(BitLinear(width, width, bias=False).eval())
    return pack_model(layer) if case == "packed" else layer


def decoder(case: str, dim: int) -> nn.Module:
    """Build the reference decoder of a case."""
    torch.manual_seed(0)
    ternary = case in ("training", "packed")
    model = build_model(
        "decoder", vocab_size=VOCABULARY, dim=dim, layers=LAYERS, heads=dim // 64, ternary=ternary
    ).eval()
    if case == "bf16":
        return model.bfloat16()
    return pack_model(model) if case == "packed" else own_codes(model)


def turn_of(call: Callable[[], Any]) -> Callable[[], float]:
    """A turn: the call repeated for TURN_SECONDS; gives the mean microseconds of a call."""
    for _ in range(3):
        call()
    started = time.perf_counter()
    call()
    repeats = max(1, round(TURN_SECONDS / (time.perf_counter() - started)))

    def turn() -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - started) / repeats * 1e6

    return turn


@torch.no_grad()
def prepare_decoder(case: str, dim: int, compiled: bool, threads: int) -> tuple[Callable[[], float], dict]:
    """In a process of its own: the turn of one decoder on one token."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)  # for the turns, which come after this function
    model = decoder(case, dim)
    if compiled:
        model.compile(dynamic=False)
    return turn_of(functools.partial(model, torch.zeros(1, 1, dtype=torch.long))), {}


def summarize(times: dict[str, list[float]], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a case: microseconds, and float32's time over the case's within each round."""
    rows = []
    for case, values in times.items():
        low, median, high = (round(q, 2) for q in quartiles(values))
        speedup = ratio_quartiles(times["float32"], values)
        rows.append(
            {**facts, "case": case, "us": median, "us_quartiles": [low, high], "speedup_quartiles": speedup}
        )
        print(f"{facts} {case}: {median:.1f} us, {speedup[1]:.2f}x float32", flush=True)
    return rows


@torch.no_grad()
def layer_rows(width: int, counts: Sequence[int], rounds: int, warmup: int) -> list[dict[str, Any]]:
    """Time the layers of one width."""
    torch.manual_seed(0)
    layers = {case: linear(case, width) for case in CASES}
    found = []
    for count in counts:
        x = torch.randn(count, width)
        inputs = {case: x.bfloat16() if case == "bf16" else x for case in CASES}
        turns = {case: turn_of(functools.partial(layers[case], inputs[case])) for case in CASES}
        times: dict[str, list[float]] = {case: [] for case in CASES}
        for _ in range(warmup + rounds):
            for case, turn in turns.items():
                times[case].append(turn())
        facts = {"what": "layer", "width": width, "rows": count, "rounds": rounds}
        found += summarize({case: values[warmup:] for case, values in times.items()}, facts)
    return found


def decoder_rows(dim: int, compiled: bool, rounds: int, warmup: int) -> list[dict[str, Any]]:
    """Time the decoders of one width, one token without a past."""
    workers: dict[str, Worker] = {}
    try:
        for case in CASES:
            workers[case] = Worker(prepare_decoder, case, dim, compiled, torch.get_num_threads())
        times: dict[str, list[float]] = {case: [] for case in CASES}
        for _ in range(warmup + rounds):
            for case, worker in workers.items():
                times[case].append(worker.turn())
    except CaseError as error:
        raise SystemExit(f"decoder of width {dim}: {error}") from error
    finally:
        for worker in workers.values():
            worker.close()
    facts = {"what": "decoder", "width": dim, "layers": LAYERS, "compiled": compiled, "rounds": rounds}
    return summarize({case: values[warmup:] for case, values in times.items()}, facts)


def disk_row(dim: int) -> dict[str, Any]:
    """Bytes of a session without latents, and of its ternary layers alone."""
    model = decoder("training", dim)
    ternary = sum(layer.weight.numel() for _, layer in ternary_layers(model))
    total = sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        saved = save_compressed_model(model, Path(folder) / "session", latents=False)
        size = sum(file.stat().st_size for file in saved.iterdir())
    in_float = (total - ternary) * 4
    row = {
        "what": "disk",
        "width": dim,
        "layers": LAYERS,
        "session_bytes": size,
        "float32_bytes": total * 4,
        "ternary_float32_bytes": ternary * 4,
        # What is not float weights, manifest included, is charged to the ternary layers.
        "ternary_bytes": size - in_float,
        "ternary_ratio": round(ternary * 4 / (size - in_float), 2),
    }
    print(row, flush=True)
    return row


def main() -> None:
    """Time layers and decoders and write the record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS)
    parser.add_argument("--decoders", type=int, nargs="*", default=DECODERS)
    parser.add_argument("--out", type=Path, default=RECORD)
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    common = timing_circumstances(found.threads)

    def keep(rows: list[dict[str, Any]]) -> None:
        write_rows(found.out, [{**row, **common} for row in rows])

    for width in found.widths:
        # The widest layers take long turns of many rows; a third of the rounds gives quartiles too.
        rounds = found.rounds if width < 4096 else max(3, found.rounds // 3)
        keep(layer_rows(width, found.rows, rounds, found.warmup))
    for dim in found.decoders:
        for compiled in (False, True):
            keep(decoder_rows(dim, compiled, found.rounds, found.warmup))
        keep([disk_row(dim)])


if __name__ == "__main__":
    main()
