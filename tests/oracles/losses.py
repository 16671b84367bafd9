"""Losses written out in plain float64 numpy, one loop per sum, from the formulas in the papers."""

from __future__ import annotations

import math

import numpy as np


def log_softmax(row, temperature=1.0):
    row = np.asarray(row, dtype=np.float64) / temperature
    return row - (row.max() + math.log(np.exp(row - row.max()).sum()))


def cross_entropy(logits, targets, label_smoothing=0.0, ignore=-100):
    """Mean over the rows whose target counts; (1 - e) on the target plus e spread over all classes."""
    logits, targets = np.asarray(logits, np.float64), np.asarray(targets)
    rows, labels = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    values = []
    for row, label in zip(rows, labels, strict=True):
        if label == ignore:
            continue
        wanted = np.full(len(row), label_smoothing / len(row))
        wanted[label] += 1 - label_smoothing
        values.append(-(wanted * log_softmax(row)).sum())
    return sum(values) / len(values) if values else 0.0


def quantization_penalty(layers):
    """layers: (weight, codes, scale) triples; sum over layers of mean((w / scale - code)^2)."""
    total = 0.0
    for weight, codes, scale in layers:
        weight, codes = np.asarray(weight, np.float64), np.asarray(codes, np.float64)
        total += float((((weight / scale) - codes) ** 2).mean())
    return total


def distillation(student, teacher, targets, temperature=2.0, alpha=0.3, ignore=-100):
    """(1 - alpha) CE + alpha T^2 mean KL(teacher_T || student_T) over the rows that count."""
    classes = np.asarray(student).shape[-1]
    rows_s = np.asarray(student, np.float64).reshape(-1, classes)
    rows_t = np.asarray(teacher, np.float64).reshape(-1, classes)
    divergences = []
    for s, t, label in zip(rows_s, rows_t, np.asarray(targets).reshape(-1), strict=True):
        if label == ignore:
            continue
        log_p, log_q = log_softmax(t, temperature), log_softmax(s, temperature)
        divergences.append(sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)))
    kl = sum(divergences) / len(divergences)
    return (1 - alpha) * cross_entropy(student, targets) + alpha * temperature**2 * kl


def regression(kind, outputs, targets, delta=1.0):
    values = []
    for o, t in zip(np.asarray(outputs).ravel(), np.asarray(targets).ravel(), strict=True):
        e = abs(float(o) - float(t))
        if kind == "mse":
            values.append(e * e)
        elif kind == "mae":
            values.append(e)
        else:
            values.append(e * e / 2 if e <= delta else delta * (e - delta / 2))
    return sum(values) / len(values)


def kendall(losses, sigmas, regression_flags):
    """Kendall et al. 2018: L / (2 s^2) + log s for a Gaussian, L / s^2 + log s for a softmax; s is sigma."""
    return sum(
        loss / (2 * s * s if is_regression else s * s) + math.log(s)
        for loss, s, is_regression in zip(losses, sigmas, regression_flags, strict=True)
    )


def r2(outputs, targets):
    """Coefficient of determination, the plain mean over the output columns."""
    o, t = np.asarray(outputs, np.float64), np.asarray(targets, np.float64)
    o, t = o.reshape(len(t), -1), t.reshape(len(t), -1)
    each = [
        1 - ((o[:, k] - t[:, k]) ** 2).sum() / ((t[:, k] - t[:, k].mean()) ** 2).sum()
        for k in range(t.shape[1])
    ]
    return float(np.mean(each))
