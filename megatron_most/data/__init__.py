"""From manifests to batches: tokenisation, task templates, datasets on disk, blending, packing and loading."""
