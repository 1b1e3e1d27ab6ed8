"""Quantise mixture-of-experts models by expert importance, and evaluate the result."""
