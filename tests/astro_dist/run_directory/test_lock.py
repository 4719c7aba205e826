"""The lock of a run: one driver, who is not kept out by those who only ask."""

import errno
import fcntl
import threading

import pytest

from astro.errors import ConfigError, RunError
from astro_dist.run_directory import lock


def test_one_holds_it_at_a_time(tmp_path):
    root = tmp_path / "run"
    assert not lock.is_held(root)
    with lock.hold(root):
        assert lock.is_held(root)
        with pytest.raises(RunError, match="another process is at work on this run"), lock.hold(root):
            pass
    assert not lock.is_held(root)


def test_who_only_asks_keeps_nobody_out(tmp_path):
    with (tmp_path / "lock").open("w") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        threading.Timer(0.2, fcntl.flock, (asking.fileno(), fcntl.LOCK_UN)).start()
        with lock.hold(tmp_path):
            assert lock.is_held(tmp_path)


def test_file_system_without_locks_is_named_and_holds_none(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(37, "No locks available")

    (tmp_path / "lock").touch()
    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with pytest.raises(RunError, match=r"cannot lock files \(.*No locks available\)"), lock.hold(tmp_path):
        pass
    assert not lock.is_held(tmp_path)


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EROFS, ConfigError), (errno.ENOSPC, RunError), (errno.EIO, RunError)]
)
def test_what_may_pass_is_no_wrong_input(tmp_path, monkeypatch, number, kind):
    def refuse(*_, **__):
        raise OSError(number, "refused")

    monkeypatch.setattr(lock.Path, "mkdir", refuse)
    with pytest.raises(kind, match="cannot be written"):
        lock.hold(tmp_path).__enter__()


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/run: the run directory \(output.dir\) cannot be written"):
        lock.hold(tmp_path / "file" / "run").__enter__()
