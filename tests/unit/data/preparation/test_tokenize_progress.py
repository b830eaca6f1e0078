"""The progress of tokenization: files, hours, speed, what is rejected, and the time left."""

from megatron_most.data.preparation import tokenize_progress as module
from megatron_most.data.preparation.tokenize_progress import Progress


def test_it_tells_files_hours_speed_and_the_time_left(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    progress = Progress(total=50, already_done=10)
    now[0] += 1
    progress.show(1, 10.0, 0)  # too early to say something again
    now[0] += 19
    progress.show(8, 7200.0, 2)
    now[0] += 80
    progress.show(40, 36000.0, 2, last=True)
    assert capsys.readouterr().err.splitlines() == [
        "tokenize: 18/50 files, 2.00 h of audio at 360 h/h, 2 rejected, 80 s left",
        "tokenize: 50/50 files, 10.00 h of audio at 360 h/h, 2 rejected",
    ]
