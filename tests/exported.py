"""What the tests of the exporters share: models whose every weight matters, and what close means."""

import torch


def lively(model, weights=0.1):
    """Weights and gains that hide no term of the formula, as after training."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (weights if p.dim() > 1 else 0.3))
    return model.eval()


def assert_close(ours, theirs):
    """Equal to float rounding at most places; where a value falls to the next int8 step, near."""
    rows = (ours - theirs).detach().abs().flatten(0, -2).amax(-1)
    assert float(rows.median()) < 1e-5
    assert float(rows.max()) < 0.1 * float(ours.detach().abs().max())
