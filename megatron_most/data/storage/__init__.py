"""Documents, datasets and tokenized audio, on disk and in memory."""
