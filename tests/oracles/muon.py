"""Muon (Jordan 2024; Liu et al. 2025, arXiv:2502.16982) in float64, by singular values."""

import numpy as np

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(x, triples=(COEFFICIENTS,) * 5):
    """The odd polynomials a s + b s^3 + c s^5 applied to each singular value, one after the other."""
    u, s, vt = np.linalg.svd(np.asarray(x, dtype=np.float64), full_matrices=False)
    s = s / max(np.sqrt(np.sum(s**2)), 1e-7)
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return u @ np.diag(s) @ vt


def muon(
    gradients,
    weight,
    lr,
    weight_decay=0.1,
    momentum=0.95,
    nesterov=True,
    adjust="match_rms_adamw",
    triples=(COEFFICIENTS,) * 5,
):
    """Yields the weight after each step."""
    w = np.asarray(weight, dtype=np.float64).copy()
    buffer = np.zeros_like(w)
    rows, columns = w.shape
    ratio = (
        0.2 * np.sqrt(max(rows, columns)) if adjust == "match_rms_adamw" else np.sqrt(max(1, rows / columns))
    )
    for g in gradients:
        g = np.asarray(g, dtype=np.float64)
        buffer = momentum * buffer + (1 - momentum) * g
        update = (1 - momentum) * g + momentum * buffer if nesterov else buffer
        w = w * (1 - lr * weight_decay) - lr * ratio * orthogonalize(update, triples)
        yield w.copy()
