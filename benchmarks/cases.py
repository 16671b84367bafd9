"""What the benchmarks train: one decoder, with hidden linear layers of Forge, of torch and of others.

Every case has the same architecture, initial values, embedding, head and batch; only the hidden linear
layers and the optimizer around them differ. ``CASES`` names them all. Libraries that are not installed fail
when a case is built, not before: ``make bench`` installs them, nothing else needs them.
"""

import functools
import importlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interleave import reason
from phase4_bitnet import build_model
from phase4_bitnet.convert import hidden_linears
from phase4_bitnet.naive import convert_model_to_naive
from phase5_training import BitNetOptimizer, GrokfastConfig
from phase5_training.config import TrainingConfig
from phase5_training.hardware import compile_model
from phase5_training.optimizers import build_optimizer
from phase5_training.pipeline.grokfast_trainer import GradientFilter

VOCABULARY = 256
MAX_LENGTH = 256
# Small: the loss of random bytes cannot fall, and no case may drift away while it is timed.
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.1


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The decoder and the batch of one comparison.

    Args:
        width: of the residual stream. layers: number of blocks. tokens: in one optimizer step.
    """

    width: int
    layers: int
    tokens: int

    def __post_init__(self) -> None:
        if self.tokens % self.length:
            raise ValueError(
                f"tokens={self.tokens} is no multiple of the length {self.length}; use a multiple of it"
            )

    @property
    def heads(self) -> int:
        """Of width 64; four of 32 in the narrowest decoder."""
        return max(4, self.width // 64)

    @property
    def length(self) -> int:
        """Tokens of one sequence."""
        return min(MAX_LENGTH, self.tokens)

    @property
    def hidden_weights(self) -> int:
        """Weights of the hidden linear layers: 3 + 1 in attention, 4 + 4 in the MLP, times width squared."""
        return 12 * self.layers * self.width**2

    @property
    def flops(self) -> int:
        """Of one step, forward and backward: 6 a weight and token, and attention unhalved.

        Chowdhery et al. 2022 (arXiv:2204.02311), appendix B: 6 N + 12 layers * width * length a token.
        """
        weights = self.hidden_weights + VOCABULARY * self.width
        return self.tokens * (6 * weights + 12 * self.layers * self.width * self.length)

    def batch(self, device: str) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (tokens / length, length) int64: random bytes, the same every time."""
        generator = torch.Generator().manual_seed(0)
        data = torch.randint(VOCABULARY, (self.tokens // self.length, self.length + 1), generator=generator)
        data = data.to(device)
        return data[:, :-1].contiguous(), data[:, 1:].contiguous()


@dataclass(frozen=True, kw_only=True)
class Training:
    """A model and the optimizer that trains it; ``optimizer`` has ``step`` and ``zero_grad``."""

    model: nn.Module
    optimizer: Any


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to train the decoder.

    Args:
        title: for the table.
        kind: "float", "ternary peer", "int8 peer" (float weights, int8 products) or "forge".
        build: gives model and optimizer on a device.
        autocast: dtype of autocast in the forward; None for none.
        imports: modules to import before the memory of the process is first looked at.
        memory_budget: share of the activations that are kept for backward when it is compiled.
    """

    title: str
    kind: str
    build: Callable[[Shape, str], Training]
    autocast: torch.dtype | None = None
    imports: tuple[str, ...] = field(default=())
    memory_budget: float = 1.0

    def loss_function(self, model: nn.Module, device: str) -> Callable[[Tensor, Tensor], Tensor]:
        """Next-token cross entropy of ``model`` under the case's autocast, ready to be compiled."""

        def loss(inputs: Tensor, targets: Tensor) -> Tensor:
            with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
                logits = model(inputs)
            return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

        return loss


class CastLinear(nn.Linear):
    """Casts input and weight to bf16 before torchao's product.

    torchao's tensor subclasses do so themselves under CUDA's autocast and take no notice of the CPU's.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight.to(torch.bfloat16), self.bias)


def decoder(shape: Shape, device: str, **options: Any) -> nn.Module:
    """The reference decoder with the same initial values for every case."""
    torch.manual_seed(0)
    return build_model(
        "decoder", vocab_size=VOCABULARY, dim=shape.width, layers=shape.layers, heads=shape.heads,
        max_length=MAX_LENGTH, **options,
    ).to(device)  # fmt: skip


def replace_hidden(model: nn.Module, make: Callable[[int, int], nn.Linear]) -> None:
    """Put ``make(in_features, out_features)`` in the place of each hidden linear layer, with its weight."""
    for name in hidden_linears(model):
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        new = make(old.in_features, old.out_features)
        new.weight = old.weight
        model.set_submodule(name, new)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW for all parameters, as Forge builds it."""
    (optimizer,) = build_optimizer("adamw", model, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    return optimizer


def _float(shape: Shape, device: str) -> Training:
    model = decoder(shape, device, ternary=False)
    return Training(model=model, optimizer=adamw(model))


def _naive(shape: Shape, device: str) -> Training:
    model = convert_model_to_naive(decoder(shape, device, ternary=False))
    return Training(model=model, optimizer=adamw(model))


def _autobit(shape: Shape, device: str) -> Training:
    """As transformers builds it for training: BitNetQuantConfig(quantization_mode="online")."""
    from transformers.integrations.bitnet import AutoBitLinear

    model = decoder(shape, device, ternary=False)
    replace_hidden(model, lambda a, b: AutoBitLinear(a, b, bias=False, device="meta", online_quant=True))
    return Training(model=model, optimizer=adamw(model))


def _torchao(
    config: str, *, cast: bool = False, dtype: torch.dtype = torch.float32
) -> Callable[[Shape, str], Training]:
    """torchao's weight subclass ``config`` of quantized_training on the hidden layers.

    Args:
        config: its name.
        cast: input and weight to bf16 in each layer. dtype: of all parameters.
    """

    def build(shape: Shape, device: str) -> Training:
        from torchao import quantize_
        from torchao.prototype import quantized_training

        model = decoder(shape, device, ternary=False).to(dtype)
        if cast:
            replace_hidden(model, lambda a, b: CastLinear(a, b, bias=False, device="meta"))
        hidden = set(hidden_linears(model))
        quantize_(model, getattr(quantized_training, config)(), filter_fn=lambda _, name: name in hidden)
        return Training(model=model, optimizer=adamw(model))

    return build


def _parq(shape: Shape, device: str) -> Training:
    """torchao's QuantOptimizer: ternary weights, float activations; the layers stay nn.Linear.

    Hard quantization (the straight-through map) from the first step, levels refreshed every ten steps,
    which is its default.
    """
    from torchao.prototype.parq import ProxHardQuant, QuantOptimizer, TernaryUnifQuantizer

    model = decoder(shape, device, ternary=False)
    hidden = [model.get_submodule(name).weight for name in hidden_linears(model)]
    taken = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in taken]
    groups = [{"params": hidden, "quant_bits": 0}, {"params": rest}]
    base = torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    return Training(model=model, optimizer=QuantOptimizer(base, TernaryUnifQuantizer(), ProxHardQuant()))


def _forge(
    backward: str, optimizer: str = "adamw", grokfast: dict[str, Any] | None = None
) -> Callable[[Shape, str], Training]:
    """Forge's BitLinear under BitNetOptimizer; ``grokfast`` are options of its filter."""

    def build(shape: Shape, device: str) -> Training:
        model = decoder(shape, device, backward=backward)
        inner = build_optimizer(optimizer, model, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        gradient_filter = None if grokfast is None else GradientFilter(GrokfastConfig(**grokfast))
        return Training(model=model, optimizer=BitNetOptimizer(inner, model, gradient_filter=gradient_filter))

    return build


_BF16 = torch.bfloat16
_BUDGET = TrainingConfig().memory_budget
_AO = ("torchao", "torchao.prototype.quantized_training")
_PARQ = ("torchao.prototype.parq",)
_HF = ("transformers.integrations.bitnet",)
# Said where bf16 autocast is meant: parameters stay float32.
CASES: dict[str, Case] = {
    "float-fp32": Case(title="nn.Linear, float32", kind="float", build=_float),
    "float-bf16": Case(title="nn.Linear, bf16 autocast", kind="float", build=_float, autocast=_BF16),
    "float-fp32-budget": Case(
        title="nn.Linear, float32, Forge's memory budget", kind="float", build=_float, memory_budget=_BUDGET
    ),
    "float-bf16-budget": Case(
        title="nn.Linear, bf16 autocast, Forge's memory budget",
        kind="float",
        build=_float,
        autocast=_BF16,
        memory_budget=_BUDGET,
    ),
    "naive-fp32": Case(title="fake-quant BitLinear, float32", kind="ternary peer", build=_naive),
    "naive-bf16": Case(
        title="fake-quant BitLinear, bf16 autocast", kind="ternary peer", build=_naive, autocast=_BF16
    ),
    "torchao-fp32": Case(
        title="torchao bitnet_training, float32",
        kind="ternary peer",
        build=_torchao("bitnet_training"),
        imports=_AO,
    ),
    "torchao-bf16": Case(
        title="torchao bitnet_training, bf16 autocast (cast by hand)",
        kind="ternary peer",
        build=_torchao("bitnet_training", cast=True),
        autocast=_BF16,
        imports=_AO,
    ),
    "torchao-bf16-params": Case(
        title="torchao bitnet_training, bf16 parameters",
        kind="ternary peer",
        build=_torchao("bitnet_training", dtype=_BF16),
        imports=_AO,
    ),
    "torchao-int8-fp32": Case(
        title="torchao int8_mixed_precision_training, float32",
        kind="int8 peer",
        build=_torchao("int8_mixed_precision_training"),
        imports=_AO,
    ),
    "torchao-int8-bf16": Case(
        title="torchao int8_mixed_precision_training, bf16 autocast (cast by hand)",
        kind="int8 peer",
        build=_torchao("int8_mixed_precision_training", cast=True),
        autocast=_BF16,
        imports=_AO,
    ),
    "parq-fp32": Case(
        title="torchao parq, float activations, float32", kind="ternary peer", build=_parq, imports=_PARQ
    ),
    "parq-bf16": Case(
        title="torchao parq, float activations, bf16 autocast",
        kind="ternary peer",
        build=_parq,
        autocast=_BF16,
        imports=_PARQ,
    ),
    "autobit-fp32": Case(
        title="transformers AutoBitLinear, float32", kind="ternary peer", build=_autobit, imports=_HF
    ),
    "autobit-bf16": Case(
        title="transformers AutoBitLinear, bf16 autocast",
        kind="ternary peer",
        build=_autobit,
        autocast=_BF16,
        imports=_HF,
    ),
    "forge-float32": Case(
        title="Forge, float32 backward", kind="forge", memory_budget=_BUDGET, build=_forge("float32")
    ),
    "forge-bf16": Case(
        title="Forge, bf16 backward, bf16 autocast",
        kind="forge",
        memory_budget=_BUDGET,
        build=_forge("bf16"),
        autocast=_BF16,
    ),
    "forge-int8": Case(
        title="Forge, int8 backward, bf16 autocast",
        kind="forge",
        memory_budget=_BUDGET,
        build=_forge("int8"),
        autocast=_BF16,
    ),
    "forge-int8-fp32": Case(
        title="Forge, int8 backward, float32", kind="forge", memory_budget=_BUDGET, build=_forge("int8")
    ),
    "forge-int8-muon": Case(
        title="Forge, int8 backward, bf16 autocast, Muon",
        kind="forge",
        memory_budget=_BUDGET,
        build=_forge("int8", "muon"),
        autocast=_BF16,
    ),
    "forge-int8-grokfast": Case(
        title="Forge, int8 backward, bf16 autocast, Grokfast",
        kind="forge",
        memory_budget=_BUDGET,
        build=_forge("int8", grokfast={}),
        autocast=_BF16,
    ),
    "forge-int8-grokfast-bf16": Case(
        title="Forge, int8 backward, bf16 autocast, Grokfast with a bf16 average",
        kind="forge",
        memory_budget=_BUDGET,
        build=_forge("int8", grokfast={"average_dtype": "bfloat16"}),
        autocast=_BF16,
    ),
    "forge-int8-fp32-grokfast": Case(
        title="Forge, int8 backward, float32, Grokfast",
        kind="forge",
        memory_budget=_BUDGET,
        build=_forge("int8", grokfast={}),
    ),
    "forge-int8-fp32-grokfast-bf16": Case(
        title="Forge, int8 backward, float32, Grokfast with a bf16 average",
        kind="forge",
        memory_budget=_BUDGET,
        build=_forge("int8", grokfast={"average_dtype": "bfloat16"}),
    ),
}


def training_step(
    case: Case, training: Training, batch: tuple[Tensor, Tensor], compiled: bool
) -> tuple[Callable[[], Tensor], dict[str, Any]]:
    """The step of a case: forward, loss, backward, optimizer step, zero_grad; it has run when this returns.

    Returns:
        The step, which gives the loss, compiled if that was asked for and works; and what came of it:
        "compiled", and "compile_error" or "compile_seconds" and "graph_breaks" (reason to count).
    """
    optimizer = training.optimizer
    loss_of = case.loss_function(training.model, batch[0].device.type)

    def step_with(loss_function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        loss = loss_function(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    eager = functools.partial(step_with, loss_of)
    if not compiled:
        eager()
        return eager, {"compiled": False}
    fast = functools.partial(step_with, compile_model(loss_of, case.memory_budget, dynamic=False))
    started = time.perf_counter()
    try:
        fast()
    except Exception as error:  # whatever the compiler could not do; without it the case still counts
        torch._dynamo.reset()
        optimizer.zero_grad()
        eager()
        return eager, {"compiled": False, "compile_error": reason(error)}
    fast()  # gradients and optimizer state exist now: what is guarded on them is compiled again
    return fast, {
        "compiled": True,
        "compile_seconds": round(time.perf_counter() - started, 1),
        "graph_breaks": dict(torch._dynamo.utils.counters["graph_break"]),
    }


def import_libraries(case: Case) -> None:
    """Import what the case will need, so that its memory is not taken for the model's."""
    # torchao reports as errors that its CUDA extensions do not load, also where there is no CUDA.
    logging.getLogger("torchao").setLevel(logging.CRITICAL)
    for module in case.imports:
        importlib.import_module(module)


def choose(names: list[str], default: tuple[str, ...]) -> list[str]:
    """Names of cases for ``--cases``: shell patterns are not needed, a prefix stands for all it begins.

    Raises:
        SystemExit: a name begins no case.
    """
    chosen: list[str] = []
    for name in names or default:
        found = [name] if name in CASES else [c for c in CASES if c.startswith(name)]
        if not found:
            raise SystemExit(f"--cases {name} begins no case; there are {', '.join(CASES)}")
        chosen += [c for c in found if c not in chosen]
    return chosen
