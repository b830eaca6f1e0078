"""The vocabulary layout that a dataset is built for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_most.data.storage.codes import CodecIdentity
from megatron_most.errors import ConfigError
from megatron_most.vocab import ModalityRange, VocabLayout


@dataclass(frozen=True)
class VocabOptions:
    """What is said of the model's vocabulary; the tokenizer and the codec say the rest.

    layout: a name of :mod:`megatron_most.codec_layouts`.
    text_vocab_size: text ids of the model, which may be more than its tokenizer's; None takes the tokenizer's.
    num_codebooks: how many of the codec's codebooks the model knows, from the first on; None takes all. Needed where no
        codes say what the codec has.
    codebook_size: the codec's, where no codes say it.
    further_modalities: ranges of text ids that are modalities of their own in the model.
    """

    layout: str = "frame"
    text_vocab_size: int | None = None
    num_codebooks: int | None = None
    codebook_size: int | None = None
    further_modalities: Sequence[ModalityRange] = ()

    def vocab_of(self, tokenizer_size: int, codec: CodecIdentity | None) -> VocabLayout:
        """The layout for a tokenizer of so many ids and a codec; :class:`ConfigError` where they do not fit."""
        text_vocab_size = self.text_vocab_size or tokenizer_size
        if text_vocab_size < tokenizer_size:
            raise ConfigError(f"text_vocab_size={text_vocab_size}: the tokenizer has {tokenizer_size} ids")
        num_codebooks, codebook_size = self._codebooks(codec)
        return VocabLayout(text_vocab_size, num_codebooks, codebook_size, self.layout, list(self.further_modalities))

    def _codebooks(self, codec: CodecIdentity | None) -> tuple[int, int]:
        number, size = self.num_codebooks, self.codebook_size
        if codec is None:
            if number is None or size is None:
                raise ConfigError(
                    "num_codebooks and codebook_size: needed where no codes say what the model's codec is"
                )
            return number, size
        if size not in (None, codec.codebook_size):
            raise ConfigError(f"codebook_size={size}: codec {codec.name} has {codec.codebook_size}")
        if number is not None and number > codec.num_codebooks:
            raise ConfigError(f"num_codebooks={number}: codec {codec.name} has {codec.num_codebooks}")
        return number or codec.num_codebooks, codec.codebook_size
