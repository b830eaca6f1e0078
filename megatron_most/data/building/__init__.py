"""Tokenized audio, text or conversations, and a task -> a dataset."""
