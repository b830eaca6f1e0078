"""Measuring trained models: word error rate, recognizers, and the evaluation suites."""
