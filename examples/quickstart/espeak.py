"""Text to speech with espeak-ng, in this process: no root, no network, no ``espeak-ng`` on the PATH.

The library and its data come from the PyPI package ``espeakng-loader``; this module drives them through ctypes.

espeak-ng carries hidden state from one utterance to the next (oscillator phase, flutter, voice data), and its interface
cannot reset it: the same sentence sounds a little different the second time. Here every utterance is spoken by a forked
child of a process whose engine has never spoken, so a sentence always gives the same samples. The fork takes a few
milliseconds.
"""

from __future__ import annotations

import ctypes
import os

import numpy as np

from megatron_most.errors import ConfigError, DataError
from megatron_most.extras import require

INSTALL_HINT = "espeak-ng is not available: run `pip install --force-reinstall espeakng-loader`"

# From espeak-ng's speak_lib.h (1.52).
AUDIO_OUTPUT_SYNCHRONOUS = 2  # espeak_Synth returns when the whole text was handed to the callback
CHARS_UTF8 = 1
PARAMETER_RATE, PARAMETER_PITCH = 1, 3
EE_OK = 0

UNKNOWN_VOICE = 3  # exit status of the child

_SynthCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Espeak:
    """An espeak-ng engine.

    Attributes:
        sample_rate: samples per second of what :meth:`synthesize` returns (22050 for every English voice).

    Raises:
        ConfigError: the package ``espeakng-loader`` is missing, or its library cannot be loaded or initialized.
    """

    def __init__(self) -> None:
        require("espeakng_loader")
        import espeakng_loader

        try:
            self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        except OSError as error:
            raise ConfigError(f"{INSTALL_HINT} (its library cannot be loaded: {error})") from error

        data_path = espeakng_loader.get_data_path().encode()
        self.sample_rate = self._library.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, data_path, 0)
        if self.sample_rate <= 0:
            raise ConfigError(f"espeak-ng cannot be initialized with the data at {data_path.decode()}")
        self._chunks: list[bytes] = []
        self._callback = _SynthCallback(self._collect)  # keeps the object alive; the library holds only its address
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples, num_samples: int, _events) -> int:
        if num_samples > 0:
            self._chunks.append(ctypes.string_at(samples, num_samples * ctypes.sizeof(ctypes.c_short)))
        return 0  # 0 continues the synthesis

    def synthesize(self, text: str, *, voice: str = "en-us", speed: int = 175, pitch: int = 50) -> np.ndarray:
        """Speak ``text``: float32 ``[num_samples]`` in [-1, 1] at :attr:`sample_rate`.

        The same arguments give the same samples.

        Args:
            voice: an espeak-ng voice, with an optional variant: ``en-us``, ``en-gb-x-rp+f2``.
            speed: words per minute, 80 to 450.
            pitch: 0 to 99; 50 is the voice's default.

        Raises:
            ConfigError: espeak-ng has no such voice.
            DataError: espeak-ng produces no sound for the text.
        """
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:  # os._exit: buffers and exit handlers of the parent must not run twice
            try:
                os.close(read_end)
                if self._library.espeak_SetVoiceByName(voice.encode()) != EE_OK:
                    os._exit(UNKNOWN_VOICE)
                with os.fdopen(write_end, "wb") as pipe:
                    pipe.write(self._speak(text, speed, pitch))
            finally:
                os._exit(0)
        os.close(write_end)
        with os.fdopen(read_end, "rb") as pipe:
            samples = np.frombuffer(pipe.read(), dtype=np.int16)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) == UNKNOWN_VOICE:
            raise ConfigError(f"espeak-ng has no voice {voice!r}")
        if not samples.size:
            raise DataError(f"espeak-ng cannot speak {text!r}")
        return samples.astype(np.float32) / 32768.0

    def _speak(self, text: str, speed: int, pitch: int) -> bytes:
        """Speak with this process's engine: native int16 samples, empty if espeak-ng refuses."""
        self._library.espeak_SetParameter(PARAMETER_RATE, speed, 0)
        self._library.espeak_SetParameter(PARAMETER_PITCH, pitch, 0)
        self._chunks = []
        data = text.encode()
        self._library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 0, 0, CHARS_UTF8, None, None)
        return b"".join(self._chunks)
