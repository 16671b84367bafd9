"""The formulas of BitNet b1.58 (arXiv:2402.17764, eq. 1-3) and its straight-through gradients, in float64."""

import numpy as np


def ternary(weight):
    w = np.asarray(weight, dtype=np.float64)
    mean = np.mean(np.abs(w))
    return np.round(np.clip(w / max(mean, 1e-5), -1, 1)), mean


def binary(weight):
    w = np.asarray(weight, dtype=np.float64)
    return np.where(w < 0, -1.0, 1.0), np.mean(np.abs(w))


def int8_rows(x):
    x = np.asarray(x, dtype=np.float64)
    largest = np.maximum(np.max(np.abs(x), axis=-1, keepdims=True), 1e-5)
    return np.round(x * 127 / largest), largest / 127


def rms_norm(x, eps=1e-5):
    x = np.asarray(x, dtype=np.float64)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def linear_forward(x, weight, bias=None, quantize=ternary):
    """Return (output, int32 accumulator, dequantized input, dequantized weight)."""
    codes, mean = quantize(weight)
    scale = float(np.float16(mean))
    rows, row_scale = int8_rows(x)
    accumulator = rows @ codes.T
    out = accumulator * row_scale * scale
    if bias is not None:
        out = out + np.asarray(bias, dtype=np.float64)
    return out, accumulator, rows * row_scale, codes * scale


def linear_backward(grad, x_hat, w_hat):
    """Straight-through: (gradient of the input, gradient of the latent weight)."""
    g = np.asarray(grad, dtype=np.float64)
    return g @ w_hat, g.T @ x_hat
