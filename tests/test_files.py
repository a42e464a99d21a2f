from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from accord.errors import ResourceError
from accord.files import atomic_directory, atomic_file, disk_error, disk_errors, write_text


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "deep" / "report.json"
    with atomic_file(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.suffix == ".json", "writers choose a format by the suffix"
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert os.listdir(path.parent) == ["report.json"]


def test_a_failure_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as temporary:
        temporary.write_text(f"new {1 / 0}")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_directory_replaces_the_old_one_entirely(tmp_path):
    path = tmp_path / "model"
    for name in ["old.bin", "new.bin"]:
        with atomic_directory(path) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / name).write_text(name)
    assert [file.name for file in path.rglob("*.bin")] == ["new.bin"]
    assert os.listdir(tmp_path) == ["model"]


def test_a_failure_leaves_the_old_directory_and_no_litter(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "weights").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_directory(path) as temporary:
        (temporary / "weights").write_text(f"new {1 / 0}")
    assert (path / "weights").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom accord.files import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('new')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert killed.returncode == -9
    assert path.read_text() == "old"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_permissions_are_those_of_an_ordinary_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.txt", "ä")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == mode
    assert (tmp_path / "a.txt").read_bytes() == "ä".encode()


def test_a_full_disk_is_one_message():
    """/dev/full is a real device whose every write fails with ENOSPC."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(ResourceError) as caught, disk_errors(Path("/dev/full")):
        Path("/dev/full").write_text("x")
    assert "The disk is full" in str(caught.value)
    assert "--resume" in caught.value.fix


def test_a_full_disk_that_a_library_in_rust_met(tmp_path):
    """The words of safetensors, whose error is no OSError. (It renames over its target: never let it near a device.)"""
    words = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(ResourceError, match="The disk is full"), disk_errors(tmp_path):
        raise RuntimeError(words)
    with pytest.raises(RuntimeError, match="nothing of the sort"), disk_errors(tmp_path):
        raise RuntimeError("nothing of the sort")


def test_a_file_where_a_directory_should_be(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(ResourceError, match=r"(Not a directory|File exists)\.") as caught:
        write_text(tmp_path / "runs" / "x" / "config.toml", "")
    assert str(tmp_path / "runs") in caught.value.where


def test_a_directory_where_a_file_should_be(tmp_path):
    (tmp_path / "report.json").mkdir()
    with pytest.raises(ResourceError, match="Is a directory"):
        write_text(tmp_path / "report.json", "")
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_file_in_the_place_of_a_directory_stays(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(ResourceError, match="Not a directory"), atomic_directory(tmp_path / "model") as temporary:
        (temporary / "weights").write_text("new")
    assert (tmp_path / "model").read_text() == "mine"
    assert os.listdir(tmp_path) == ["model"]


def test_other_errors_pass_through(tmp_path):
    assert disk_error(OSError(errno.ECONNRESET, "reset"), tmp_path) is None
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        (tmp_path / "absent").read_text()
