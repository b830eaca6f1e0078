"""The vocabulary layout of a dataset to build."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_most.data.storage.codes import CodecIdentity
from megatron_most.errors import ConfigError
from megatron_most.vocab import ModalityRange, VocabLayout


@dataclass(frozen=True)
class VocabOptions:
    """The model's vocabulary, as far as the tokenizer and the codec do not determine it.

    layout: a name from :data:`megatron_most.codec_layouts.CODEC_LAYOUTS`.
    text_vocab_size: the model's text ids; it may have more than its tokenizer. None for the tokenizer's.
    num_codebooks: use the first ``num_codebooks`` of the codec; None for all. Required for text without codes.
    codebook_size: values per codebook. Required for text without codes.
    further_modalities: ranges of text ids that are modalities of their own.
    """

    layout: str = "frame"
    text_vocab_size: int | None = None
    num_codebooks: int | None = None
    codebook_size: int | None = None
    further_modalities: Sequence[ModalityRange] = ()

    def vocab_of(self, tokenizer_size: int, codec: CodecIdentity | None) -> VocabLayout:
        """The layout for a tokenizer of that size and a codec; :class:`ConfigError` if the options do not fit them."""
        text_vocab_size = self.text_vocab_size or tokenizer_size
        if text_vocab_size < tokenizer_size:
            raise ConfigError(
                f"text_vocab_size={text_vocab_size}: must be at least {tokenizer_size}, the tokenizer's size"
            )
        num_codebooks, codebook_size = self._codebooks(codec)
        return VocabLayout(text_vocab_size, num_codebooks, codebook_size, self.layout, list(self.further_modalities))

    def _codebooks(self, codec: CodecIdentity | None) -> tuple[int, int]:
        number, size = self.num_codebooks, self.codebook_size
        if codec is None:
            if number is None or size is None:
                raise ConfigError(f"num_codebooks={number}, codebook_size={size}: both are required without codes")
            return number, size
        if size not in (None, codec.codebook_size):
            raise ConfigError(f"codebook_size={size}: must be {codec.codebook_size}, as in codec {codec.name}")
        if number is not None and number > codec.num_codebooks:
            raise ConfigError(
                f"num_codebooks={number}: must be at most {codec.num_codebooks}, as in codec {codec.name}"
            )
        return number or codec.num_codebooks, codec.codebook_size
