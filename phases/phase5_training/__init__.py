"""Ternary network training: data, optimizer, Grokfast, phases, validation."""
