"""Milliseconds of an optimizer step by itself: torch's, ours with all that codes need, and the usual loop.

    python benchmarks/bench_optimizer.py [--threads 2] [--widths 128 384 768 1536]

The cases of a width take turns in one process, each on its own copy of the parameters. Before a turn
every case gets the same gradients, as a backward would have left them; that is not timed. Ratios are taken
within a round, against torch's fused AdamW alone, and for the Muon cases against torch's Muon with AdamW.
Rows are appended to benchmarks/records/optimizer.jsonl.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from interleave import quartiles, ratio_quartiles, timing_circumstances, write_rows
from phase4_bitnet import build_model, ternary_layers
from phase4_bitnet.convert import hidden_linears
from phase5_training import BitNetOptimizer, GrokfastConfig
from phase5_training.optimizers import build_optimizer
from phase5_training.pipeline.grokfast_trainer import GradientFilter

RECORD = Path(__file__).parent / "records" / "optimizer.jsonl"
WIDTHS = (128, 384, 768, 1536)
LEARNING_RATE, WEIGHT_DECAY, MAX_NORM = 1e-3, 0.1, 1.0
ALPHA, LAMBDA = 0.98, 2.0

Turn = Callable[[], Any]


def decoder(width: int, layers: int) -> nn.Module:
    """The reference decoder; the same initial values for every case."""
    torch.manual_seed(0)
    return build_model("decoder", vocab_size=256, dim=width, layers=layers, heads=width // 64, max_length=256)


def adamw(params: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(
        params, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True
    )


def ours(model: nn.Module, inner: Optimizer | list[Optimizer], **filter_options: Any) -> Turn:
    """Clip, Grokfast, the optimizer and the codes."""
    config = GrokfastConfig(alpha=ALPHA, lambda_reg=LAMBDA, **filter_options)
    return BitNetOptimizer(inner, model, gradient_filter=GradientFilter(config), max_grad_norm=MAX_NORM).step


def general(model: nn.Module) -> Turn:
    """Ours, with a hook on AdamW that keeps the one-pass kernel away."""
    inner = adamw(model.parameters())
    inner.register_step_pre_hook(lambda *args: None)
    return ours(model, inner)


def published_filter_(
    parameters: Iterable[tuple[str, nn.Parameter]], averages: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """The published loop of Grokfast-EMA (github.com/ironjr/grokfast, ``gradfilter_ema``)."""
    named = [(n, p) for n, p in parameters if p.requires_grad and p.grad is not None]
    if averages is None:
        averages = {n: p.grad.data.detach() for n, p in named if p.grad is not None}
    for n, p in named:
        assert p.grad is not None
        averages[n] = averages[n] * ALPHA + p.grad.data.detach() * (1 - ALPHA)
        p.grad.data = p.grad.data + averages[n] * LAMBDA
    return averages


def naive_codes_(layers: Iterable[Any]) -> None:
    """Codes layer by layer, as BitLinear snippets write them."""
    for layer in layers:
        scale = layer.weight.detach().abs().mean().clamp_(min=1e-5)
        layer.codes.copy_((layer.weight.detach() / scale).round_().clamp_(-1, 1))
        layer.scale.copy_(scale)


def published(model: nn.Module) -> Turn:
    """clip_grad_norm_, the published filter, fused AdamW, naive codes."""
    optimizer, layers = adamw(model.parameters()), [layer for _, layer in ternary_layers(model)]
    averages: dict[str, Tensor] | None = None

    def step() -> None:
        nonlocal averages
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        averages = published_filter_(model.named_parameters(), averages)
        optimizer.step()
        with torch.no_grad():
            naive_codes_(layers)

    return step


def muon_of_torch(model: nn.Module) -> Turn:
    """torch.optim.Muon for hidden matrices and AdamW for the rest, alone."""
    modules = dict(model.named_modules())
    hidden = [modules[name].weight for name in hidden_linears(model)]
    taken = {id(p) for p in hidden}
    muon = torch.optim.Muon(
        hidden, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
    )
    rest = adamw([p for p in model.parameters() if id(p) not in taken])

    def step() -> None:
        muon.step()
        rest.step()

    return step


def muon(model: nn.Module) -> list[Optimizer]:
    return build_optimizer("muon", model, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def muon_alone(model: nn.Module) -> Turn:
    optimizers = muon(model)
    return lambda: [optimizer.step() for optimizer in optimizers]


# The first of each comparison is its base.
COMPARISONS: dict[str, dict[str, Callable[[nn.Module], Turn]]] = {
    "AdamW": {
        "torch AdamW alone": lambda m: adamw(m.parameters()).step,
        "one pass": lambda m: ours(m, adamw(m.parameters())),
        "one pass, high_pass": lambda m: ours(m, adamw(m.parameters()), filter="high_pass"),
        "one pass, bfloat16 average": lambda m: ours(m, adamw(m.parameters()), average_dtype="bfloat16"),
        "general path": general,
        "published loop": published,
    },
    "Muon": {
        "torch Muon alone": muon_of_torch,
        "Muon alone": muon_alone,
        "Muon, clip, Grokfast, codes": lambda m: ours(m, muon(m)),
    },
}


def layers_of(width: int) -> int:
    """Six; two in the widest decoder, so that all copies fit in memory."""
    return 6 if width < 1536 else 2


def compare(name: str, width: int, rounds: int, warmup: int) -> list[dict[str, Any]]:
    """Time the cases of one comparison in turn; one row a case."""
    models = {case: decoder(width, layers_of(width)) for case in COMPARISONS[name]}
    turns = {case: make(models[case]) for case, make in COMPARISONS[name].items()}
    some = next(iter(models.values()))
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(p.shape, generator=generator) * 1e-3 for p in some.parameters()]
    times: dict[str, list[float]] = {case: [] for case in turns}
    for _ in range(warmup + rounds):
        for case, turn in turns.items():
            for p, g in zip(models[case].parameters(), gradients, strict=True):
                p.grad = g.clone() if p.grad is None else p.grad.copy_(g)
            started = time.perf_counter()
            turn()
            times[case].append((time.perf_counter() - started) * 1e3)
    times = {case: values[warmup:] for case, values in times.items()}
    base = next(iter(times))
    rows = []
    for case, values in times.items():
        ratio = ratio_quartiles(values, times[base])
        low, median, high = (round(q, 3) for q in quartiles(values))
        rows.append(
            {
                "width": width,
                "layers": layers_of(width),
                "parameters": sum(p.numel() for p in some.parameters()),
                "case": case,
                "ms": median,
                "ms_quartiles": [low, high],
                "base": base,
                "ratio_quartiles": ratio,
                "rounds": rounds,
            }
        )
        print(f"width {width} {case}: {median:.2f} ms, {ratio[1]:.2f}x {base}", flush=True)
    return rows


def main() -> None:
    """Time every comparison at every width and append to the record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--only", choices=COMPARISONS, help="one of the comparisons")
    parser.add_argument("--out", type=Path, default=RECORD)
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    common = timing_circumstances(found.threads)
    for width in found.widths:
        for name in [found.only] if found.only else COMPARISONS:
            # A step of Muon on wide matrices takes seconds.
            rounds = found.rounds if name == "AdamW" or width < 768 else max(5, found.rounds // 4)
            rows = compare(name, width, rounds, found.warmup)
            # At once: the widest take minutes, and what was measured before them is not to be lost.
            write_rows(found.out, [{**row, **common} for row in rows])


if __name__ == "__main__":
    main()
