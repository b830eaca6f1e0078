"""How long speech is beside a recording of the same text: speech that hurries, drags or never ends stands out."""

from __future__ import annotations

from megatron_most.errors import DataError
from megatron_most.evaluation.scorers import Reference, Sound


class DurationRatio:
    """Seconds of the speech / seconds of the recording, silence included."""

    name = "duration"
    compared_with: Reference = "recording"
    values = {"duration_ratio": 0.0}

    def score(self, spoken: Sound, reference: Sound | None) -> dict[str, float]:
        assert reference is not None, "it asked for one"
        if not len(reference.audio):
            raise DataError("the recording to compare with has no sound")
        seconds, wanted = (len(sound.audio) / sound.sample_rate for sound in (spoken, reference))
        return {"duration_ratio": seconds / wanted}
