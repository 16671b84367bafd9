"""Learning rates and filter figures where the user named none."""

from phase5_training.config import TrainingConfig
from phase5_training.errors import UsageError
from phase5_training.pipeline.grokfast_trainer import GrokfastConfig

# Peak rates, from benchmarks/records: byte text (4-layer decoder of width 128) prefers 1e-2 to 3e-3 with
# Muon, and 5e-3 to 2e-3 with AdamW on the float model; ternary AdamW was measured at 3e-3 only. Modular
# arithmetic (2 layers) reaches its target soonest at 3e-3 with Muon and 1e-3 to 1.5e-3 with AdamW. The
# defaults lie between, on the side of the larger task. The figures of sgd are convention, not measured.
_PEAK = {"muon": 1e-2, "adamw": 3e-3, "sgd": 0.1}
_DECAY = {"muon": 0.1, "adamw": 0.1, "sgd": 1e-4}

# Options that shape a filter and leave its figures at their defaults.
_SHAPING = tuple(
    name
    for name in TrainingConfig.model_fields
    if name.startswith("grokfast_") and name not in ("grokfast_alpha", "grokfast_lambda")
)

# Lee et al. 2024, arXiv:2405.20233, section 4.1.
PAPER_ALPHA, PAPER_LAMBDA = 0.98, 2.0
# At full evidence. A gain of 10 over some twenty steps costs a tuned run nothing, and brought one with a rate
# too small from 2925 steps to 300; those of the paper to 2190 (benchmarks/records/filter_delayed.jsonl).
AUTO_ALPHA, AUTO_LAMBDA = 0.95, 10.0


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
    named = None if isinstance(config.learning_rate, str) else config.learning_rate
    learning_rate = _PEAK[kind] / max(1.0, factor) if named is None else named
    return learning_rate, _DECAY[kind] if config.weight_decay is None else config.weight_decay


def grokfast_config(config: TrainingConfig) -> GrokfastConfig | None:
    """The gradient filter of a run, None for none.

    It is on when ``use_grokfast`` says so, or when a figure or a filter is named. Who names alpha or lambda
    gets exactly that filter; who names none gets "auto". Off otherwise (docs/findings.md).

    Raises:
        UsageError: figures that do not go together.

    Example:
        >>> grokfast_config(TrainingConfig()) is None
        True
        >>> auto = grokfast_config(TrainingConfig(use_grokfast=True))
        >>> auto.filter, auto.alpha, auto.lambda_reg
        ('auto', 0.95, 10.0)
        >>> ours = grokfast_config(TrainingConfig(grokfast_lambda=1.0))
        >>> ours.filter, ours.alpha, ours.lambda_reg
        ('ema', 0.98, 1.0)
    """
    named = config.grokfast_alpha is not None or config.grokfast_lambda is not None
    if config.use_grokfast is None:
        on = named or config.filter is not None or any(_differs(config, option) for option in _SHAPING)
    else:
        on = config.use_grokfast
    if not on:
        return None
    name = config.filter or ("ema" if named else "auto")
    if name != "ma" and _differs(config, "grokfast_window"):
        raise UsageError(
            f"grokfast_window={config.grokfast_window} is for filter='ma', and the filter is {name!r}; "
            "give filter='ma', or leave it out"
        )
    alpha, gain = (AUTO_ALPHA, AUTO_LAMBDA) if name == "auto" else (PAPER_ALPHA, PAPER_LAMBDA)
    return GrokfastConfig(
        alpha=alpha if config.grokfast_alpha is None else config.grokfast_alpha,
        lambda_reg=gain if config.grokfast_lambda is None else config.grokfast_lambda,
        filter=name,
        window=config.grokfast_window,
        unit_gain=config.grokfast_unit_gain,
        gain_warmup_steps=config.grokfast_warmup_steps,
        phase_gains=config.grokfast_phase_gains,
        average_dtype=config.grokfast_average,
    )


def _differs(config: TrainingConfig, option: str) -> bool:
    """Whether an option has another value than its default."""
    default = TrainingConfig.model_fields[option].get_default(call_default_factory=True)
    return bool(getattr(config, option) != default)
