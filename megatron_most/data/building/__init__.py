"""Codes, texts and conversations + a task -> a dataset of documents."""
