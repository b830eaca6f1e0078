"""Locks between processes: who gets one, who does not, and when it ends."""

import errno
import os
import subprocess
import sys

from megatron_most import locks
from megatron_most.locks import locked


def is_free(path, shared: bool = False) -> bool:
    """Whether another open file gets the lock, be it of this process or of another."""
    with locked(path, shared=shared, wait=False) as lock:
        return lock is not None


def test_a_lock_is_held_to_the_end_of_the_block(tmp_path):
    path = tmp_path / "lock"
    with locked(path) as lock:
        assert lock is not None
        assert not is_free(path) and not is_free(path, shared=True)
    assert is_free(path)


def test_a_shared_lock_keeps_out_only_those_who_want_it_alone(tmp_path):
    path = tmp_path / "lock"
    with locked(path, shared=True):
        assert is_free(path, shared=True) and not is_free(path)


def test_a_child_that_inherits_the_descriptor_holds_the_lock(tmp_path):
    path = tmp_path / "lock"
    with locked(path) as lock:
        command = [sys.executable, "-c", "input()"]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[lock.fileno()])
    assert not is_free(path)
    child.communicate(b"\n")
    assert is_free(path)


def test_a_file_that_its_last_holder_removed_is_made_again(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    real = locks.fcntl.flock
    waited = []

    def flock(file, mode):
        if not waited:  # the holder removed the file while we waited for it
            path.unlink()
        waited.append(file.fileno())
        real(file, mode)

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with locked(path) as lock:
        assert lock is not None and os.path.samestat(os.stat(path), os.fstat(lock.fileno()))
    assert len(waited) == 2


def test_everyone_gets_the_lock_where_there_are_none(tmp_path, monkeypatch):
    def refuse(file, mode):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    assert is_free(tmp_path / "lock")
