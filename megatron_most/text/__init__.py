"""Text tokenizers behind one protocol."""

from megatron_most.text.tokenizer import TextTokenizer, load_tokenizer, train_sentencepiece

__all__ = ["TextTokenizer", "load_tokenizer", "train_sentencepiece"]
