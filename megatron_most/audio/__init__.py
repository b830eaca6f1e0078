"""Waveforms and codec codes: reading audio, and the NeMo codecs behind one protocol."""

from megatron_most.audio.codec import AudioCodec, codec_file, file_fingerprint
from megatron_most.audio.io import read_audio, write_wav
from megatron_most.audio.nemo_codec import load_codec

__all__ = ["AudioCodec", "codec_file", "file_fingerprint", "load_codec", "read_audio", "write_wav"]
