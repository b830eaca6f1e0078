"""Waveforms and codec codes: reading audio, and the NeMo codecs behind one protocol.

Training needs the fingerprint of a codec's file, and neither torch's import nor NeMo for it: names are imported when
they are used.
"""

from megatron_most.lazy import lazy_names

_MODULES = {
    "AudioCodec": "codec",
    "codec_file": "codec",
    "file_fingerprint": "codec",
    "load_codec": "nemo_codec",
    "read_audio": "io",
    "write_wav": "io",
}
__all__ = list(_MODULES)
__getattr__ = lazy_names(__name__, _MODULES)
