"""From recordings and texts to batches, in four rooms that import downwards only.

    storage < preparation < building < loading

``storage`` is what lies on disk, ``preparation`` makes manifests and codes of sources, ``building`` makes datasets of
these, and ``loading`` makes batches of datasets, needing ``storage`` alone.
"""
