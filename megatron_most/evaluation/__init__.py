"""Measuring trained models: word error rate, recognisers, and the evaluation suites."""
