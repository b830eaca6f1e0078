"""What lies on disk, and what it is in memory: documents, datasets, codes, lines of JSON."""
