"""Learning rates and filter figures where the user named none."""

from phase5_training.config import TrainingConfig


def rates(optimizer: str, ternary: bool, task: str) -> tuple[float, float]:
    """(learning rate, weight decay) for an optimizer.

    Args:
        optimizer: "auto", "muon", "adamw", "sgd", or "custom" for an instance.
        ternary: whether the hidden layers are ternary.
        task: what is learned.
    """
    if optimizer in ("auto", "muon"):
        return (2e-3, 0.1) if ternary else (1e-3, 0.1)
    if optimizer == "sgd":
        return 0.02, 1e-4
    return (1e-3, 0.1) if ternary else (5e-4, 0.1)


def grokfast_figures(config: TrainingConfig) -> tuple[float, float]:
    """(alpha, lambda) of the gradient filter: the user's, else the paper's."""
    alpha = 0.98 if config.grokfast_alpha is None else config.grokfast_alpha
    gain = 2.0 if config.grokfast_lambda is None else config.grokfast_lambda
    return alpha, gain
