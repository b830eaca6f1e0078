"""Datasets -> the batches of a run: blended, packed, laid out."""
