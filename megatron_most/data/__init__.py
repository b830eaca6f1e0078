"""From manifests to batches: tokenization, task templates, datasets on disk, blending, packing and loading."""
