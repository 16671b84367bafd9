"""Learning rates and filter figures where the user named none."""

from phase5_training.config import TrainingConfig

# Peak rates, from benchmarks/records: byte text (4-layer decoder of width 128) prefers 1e-2 to 3e-3 with
# Muon, and 5e-3 to 2e-3 with AdamW on the float model; ternary AdamW was measured at 3e-3 only. Modular
# arithmetic (2 layers) reaches its target soonest at 3e-3 with Muon and 1e-3 to 1.5e-3 with AdamW. The
# defaults lie between, on the side of the larger task. The figures of sgd are convention, not measured.
_PEAK = {"muon": 1e-2, "adamw": 3e-3, "sgd": 0.1}
_DECAY = {"muon": 0.1, "adamw": 0.1, "sgd": 1e-4}

# Lee et al. 2024, arXiv:2405.20233, section 4.1.
PAPER_ALPHA, PAPER_LAMBDA = 0.98, 2.0


def rates(config: TrainingConfig, optimizer: str) -> tuple[float, float]:
    """(base learning rate, weight decay) for an optimizer: the user's figures, else the defaults above.

    The base rate is what the schedule multiplies. "phases" multiplies by 5 at its peak and the other
    schedules by 1, so the default divides the peak by that factor.

    Args:
        config: learning_rate, weight_decay, schedule and acceleration_multiplier.
        optimizer: "auto", "muon", "adamw" or "sgd".

    Example:
        >>> rates(TrainingConfig(), "muon")
        (0.002, 0.1)
        >>> rates(TrainingConfig(schedule="cosine", weight_decay=0.0), "adamw")
        (0.003, 0.0)
    """
    kind = "muon" if optimizer == "auto" else optimizer
    factor = (config.acceleration_multiplier or 5.0) if config.schedule == "phases" else 1.0
    learning_rate = _PEAK[kind] / max(1.0, factor) if config.learning_rate is None else config.learning_rate
    return learning_rate, _DECAY[kind] if config.weight_decay is None else config.weight_decay


def grokfast_figures(config: TrainingConfig) -> tuple[float, float] | None:
    """(alpha, lambda) of the gradient filter, None for no filter.

    It is on when ``use_grokfast`` says so, or when a figure or a filter other than the default is named;
    figures that are not are the paper's. It is off otherwise: with tuned rates the paper's figures cost
    steps on every task measured so far (docs/findings.md).

    Example:
        >>> grokfast_figures(TrainingConfig()) is None
        True
        >>> grokfast_figures(TrainingConfig(grokfast_lambda=1.0))
        (0.98, 1.0)
        >>> grokfast_figures(TrainingConfig(filter="ma"))
        (0.98, 2.0)
    """
    named = config.grokfast_alpha is not None or config.grokfast_lambda is not None or config.filter != "ema"
    if config.use_grokfast is False or (config.use_grokfast is None and not named):
        return None
    alpha = PAPER_ALPHA if config.grokfast_alpha is None else config.grokfast_alpha
    gain = PAPER_LAMBDA if config.grokfast_lambda is None else config.grokfast_lambda
    return alpha, gain
