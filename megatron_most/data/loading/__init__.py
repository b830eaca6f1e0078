"""Datasets -> the batches of a run: blending, packing, layout."""
