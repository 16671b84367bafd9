"""The gradient filters of Lee et al. 2024 (arXiv:2405.20233) as plain loops over float64 arrays."""

from collections import deque

import numpy as np


def ema(gradients, alpha, lamb, average=None):
    """Algorithm of Grokfast-EMA: the average starts as the first gradient and is updated before use."""
    for g in gradients:
        g = np.asarray(g, dtype=np.float64)
        average = g.copy() if average is None else average
        average = average * alpha + g * (1 - alpha)
        yield g + lamb * average


def high_pass(gradients, alpha, lamb):
    average = None
    for g in gradients:
        g = np.asarray(g, dtype=np.float64)
        average = g.copy() if average is None else average
        average = average * alpha + g * (1 - alpha)
        yield g + lamb * (g - average)


def ma(gradients, window, lamb):
    """Grokfast-MA: nothing is added before the window is full."""
    queue = deque(maxlen=window)
    for g in gradients:
        g = np.asarray(g, dtype=np.float64)
        queue.append(g)
        yield g + (lamb * sum(queue) / window if len(queue) == window else 0.0)


def adamw(gradients, weight, lr, betas, eps, weight_decay):
    """Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2; yields the weight after each step."""
    w = np.asarray(weight, dtype=np.float64).copy()
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        w = w - lr * weight_decay * w
        w = w - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        yield w.copy()


def ademamix(gradients, weight, lr, betas, eps, weight_decay, gain):
    """Pagliardini et al. 2024 (arXiv:2409.03137), algorithm 1, without its two schedules."""
    w = np.asarray(weight, dtype=np.float64).copy()
    fast, slow, v = (np.zeros_like(w) for _ in range(3))
    for t, g in enumerate(gradients, 1):
        g = np.asarray(g, dtype=np.float64)
        fast = betas[0] * fast + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        slow = betas[2] * slow + (1 - betas[2]) * g
        moved = fast / (1 - betas[0] ** t) + gain * slow
        w = w - lr * (moved / (np.sqrt(v / (1 - betas[1] ** t)) + eps) + weight_decay * w)
        yield w.copy()


def clip(gradients, max_norm):
    total = np.sqrt(sum(float(np.sum(np.asarray(g, dtype=np.float64) ** 2)) for g in gradients))
    factor = min(1.0, max_norm / (total + 1e-6))
    return [np.asarray(g, dtype=np.float64) * factor for g in gradients], total


def stable_curvatures(momentum, rate, *, nesterov, count=60):
    """Curvatures on which SGD without a filter comes to rest, by the eigenvalues of its recursion."""
    found = []
    for curvature in np.geomspace(1e-3, 4 / rate, count):
        gradient = np.array([curvature, 0.0])
        velocity = gradient + np.array([0.0, momentum])
        move = gradient + momentum * velocity if nesterov else velocity
        step = np.stack([np.array([1.0, 0.0]) - rate * move, velocity])
        if np.abs(np.linalg.eigvals(step)).max() < 0.999999:
            found.append(curvature)
    return np.array(found)
