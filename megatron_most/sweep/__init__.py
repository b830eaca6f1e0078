"""Ablation sweeps: one YAML file -> many runs -> one table and one page."""
