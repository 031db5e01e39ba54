"""What is written is whole or not there, and takes no device's place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from l2p_fast.errors import UserError
from l2p_fast.files import atomic_path
from l2p_fast.sampling.jobs import check_writable


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_takes_the_place_of_a_folder(tmp_path):
    for text in ("old", "new"):
        with atomic_path(tmp_path / "a") as temporary:
            temporary.mkdir()
            (temporary / text).touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["new"]


def test_devices_and_pipes_stay(tmp_path):
    """A superuser may rename over them, and other programs need them."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "out").symlink_to("/proc/self/fd/1")
    (tmp_path / "to-pipe").symlink_to("pipe")
    for path in (tmp_path / "pipe", tmp_path / "out", tmp_path / "to-pipe"):
        with pytest.raises(UserError, match="is a device or a pipe"), atomic_path(path) as temporary:
            temporary.touch()
        with pytest.raises(UserError, match="is a device or a pipe"):
            check_writable(path)
        assert path.is_fifo() or path.is_symlink()
    with pytest.raises(UserError, match="is a device or a pipe"), atomic_path(Path(os.devnull)):
        pass
