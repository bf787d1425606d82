"""Speech with known words, from the synthesiser in the PyPI package `espeakng-loader` (`pip install espeakng-loader`).

python examples/speech.py "My dog likes to sleep." OUT.wav
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np

SAMPLING_RATE = 16000
INSTALL = "pip install --no-deps espeakng-loader"
_RETRIEVAL, _UTF8 = 1, 1  # of the C interface: hand samples to a callback; the text is UTF-8


def installed() -> bool:
    return importlib.util.find_spec("espeakng_loader") is not None


def speak(text: str) -> Any:
    """Mono samples at 16 kHz, from -1 to 1."""
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    path = str(Path(espeakng_loader.get_data_path())).encode()
    chunks: list[Any] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def keep(samples: Any, count: int, _: Any) -> int:
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    rate = library.espeak_Initialize(_RETRIEVAL, 500, path, 0)
    if rate <= 0:
        raise RuntimeError(f"espeak-ng does not start with the data in {path.decode()}")
    library.espeak_SetSynthCallback(keep)
    library.espeak_SetVoiceByName(b"en-us")
    raw = text.encode()
    library.espeak_Synth(raw, ctypes.c_size_t(len(raw) + 1), 0, 0, 0, _UTF8, None, None)
    library.espeak_Synchronize()
    library.espeak_Terminate()
    return _resampled(np.concatenate(chunks).astype(np.float32) / 32768, rate)


def _resampled(samples: Any, rate: int) -> Any:
    """Band-limited resampling: the spectrum is cut off, or goes on with zeros."""
    count = round(len(samples) * SAMPLING_RATE / rate)
    spectrum = np.fft.rfft(samples)
    wanted = np.zeros(count // 2 + 1, dtype=spectrum.dtype)
    kept = min(len(wanted), len(spectrum))
    wanted[:kept] = spectrum[:kept]
    return (np.fft.irfft(wanted, count) * count / len(samples)).astype(np.float32)


def main() -> None:
    with wave.open(sys.argv[2], "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLING_RATE)
        file.writeframes((speak(sys.argv[1]).clip(-1, 1) * 32767).astype("<i2").tobytes())


if __name__ == "__main__":
    main()
