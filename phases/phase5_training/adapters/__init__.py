"""Ternary layers, the Grokfast filter and the phases in the loops of other trainers.

``huggingface`` for transformers.Trainer, ``lightning`` for Lightning; what both do is in ``foreign_loop``. A
loop of one's own, with or without Accelerate, needs no adapter: :class:`BitNetOptimizer` wraps its optimizer.
"""
