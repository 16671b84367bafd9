"""torch's optimizers by name, over the parameters of a model."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from phase4_bitnet.convert import hidden_linears
from phase5_training.errors import UsageError, nearest_match
from phase5_training.muon import ITERATIONS, NS_STEPS, muon_class

# The second-moment decay of grokking and language-model practice (Power et al. 2022 use 0.98).
BETAS = (0.9, 0.98)
OPTIMIZERS: tuple[str, ...] = ("auto", "muon", "adamw", "sgd")
# The optimizers that have each of these options.
AVERAGES = {
    "betas": ("muon", "adamw"),
    "momentum": ("muon", "sgd"),
    "ns_steps": ("muon",),
    "ns_coefficients": ("muon",),
}


def check_optimizer_name(name: str) -> None:
    """Raise a UsageError that names the nearest, where ``name`` is not one of ``OPTIMIZERS``."""
    if name not in OPTIMIZERS:
        near = nearest_match(name, OPTIMIZERS)
        raise UsageError(
            f"optimizer={name!r} is not known; {f'did you mean {near!r}? ' if near else ''}"
            f"use one of {', '.join(OPTIMIZERS)}, or an optimizer instance"
        )


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    extra: Iterable[nn.Parameter] = (),
    betas: Sequence[float] = BETAS,
    momentum: float | None = None,
    ns_steps: int = NS_STEPS,
    ns_coefficients: str = "jordan",
) -> list[Optimizer]:
    """The torch optimizers for ``optimizer=name``, with the same rate and decay in each.

    Matrices and embeddings decay; biases, gains and ``extra`` do not.

    Args:
        name: "muon" (and "auto") uses Muon for hidden matrices (:mod:`phase5_training.muon` chooses
            the implementation) and AdamW for the rest, "adamw" and "sgd" (momentum 0.9) one
            optimizer for all.
        model: parameters with ``requires_grad``.
        learning_rate, weight_decay: for every group.
        extra: parameters of the loss, not decayed.
        betas: of AdamW. momentum: of Muon (None: 0.95) or sgd (None: 0.9).
        ns_steps: iterations of Muon.
        ns_coefficients: which ones, a key of :data:`phase5_training.muon.ITERATIONS`.

    Returns:
        One or two optimizers with disjoint parameters.

    Raises:
        UsageError: an unknown name, or nothing to train.
    """
    check_optimizer_name(name)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UsageError("the model has no parameter with requires_grad=True; unfreeze some to train it")
    muon: list[nn.Parameter] = []
    if name in ("auto", "muon"):
        modules = dict(model.named_modules())
        hidden = {id(modules[n].weight) for n in hidden_linears(model)}
        muon = [p for p in trained if id(p) in hidden and p.dim() == 2]
    taken = {id(p) for p in muon}
    rest = [p for p in trained if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [*(p for p in rest if p.dim() < 2), *extra], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    optimizers: list[Optimizer] = []
    if muon:
        triples = ITERATIONS[ns_coefficients]
        optimizers.append(
            muon_class(muon, ns_coefficients)(
                muon,
                lr=learning_rate,
                weight_decay=weight_decay,
                momentum=0.95 if momentum is None else momentum,
                ns_steps=ns_steps,
                adjust_lr_fn="match_rms_adamw",
                **({} if triples is None else {"ns_coefficients": triples}),  # type: ignore[arg-type]
            )
        )
    if groups and name == "sgd":
        optimizers.append(
            torch.optim.SGD(groups, lr=learning_rate, momentum=0.9 if momentum is None else momentum)
        )
    elif groups:
        optimizers.append(torch.optim.AdamW(groups, lr=learning_rate, betas=(betas[0], betas[1]), fused=True))
    return optimizers
