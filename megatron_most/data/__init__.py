"""From recordings and text to batches, in four layers; none imports from a layer below it in this list.

storage      documents, datasets and tokenized audio, on disk and in memory
preparation  sources -> manifests, spoken conversations, tokenized audio
building     tokenized audio, text or conversations, and a task -> a dataset
loading      datasets -> batches; imports ``storage`` only
"""
