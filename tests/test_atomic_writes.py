"""Files are written whole or not at all, whatever happens on the way."""

import os
import re
import resource
import stat
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from file_kinds import WRITERS

from sb3_mbmpo.common.atomic import _short_name, whole_file, write_whole


@contextmanager
def small_disk(kind, folder):
    """Limit the files in ``folder`` to a small size inside the block: 1 KiB each, or 8 KiB in total on a tmpfs."""
    if kind == "tmpfs":
        mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(folder)]
        if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
            pytest.skip("only root can mount a small disk; the other kind of limit is still tested")
        try:
            yield
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("kind", ["limit", "tmpfs"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_the_old_file(writer, kind, model, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(kind, disk):
        path = disk / "file.zip"
        path.write_bytes(b"old")
        with pytest.raises(OSError, match=r"(too large|No space).*what was there before is as it was: .*file\.zip"):
            WRITERS[writer](model, path)
        assert path.read_bytes() == b"old"
        assert list(disk.iterdir()) == [path]
    WRITERS[writer](model, tmp_path / "elsewhere.zip")
    assert (tmp_path / "elsewhere.zip").stat().st_size > 1024


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_on_the_way_leaves_the_old_file(error, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write():
        with whole_file(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_synced_before_it_gets_its_name_and_the_folder_afterwards(tmp_path, monkeypatch):
    """A kill cannot show this: only a power failure loses what the system has not written to the disk yet."""
    events, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(descriptor):
        status = os.fstat(descriptor)
        events.append(("sync", "folder" if stat.S_ISDIR(status.st_mode) else status.st_size))
        fsync(descriptor)

    def noted_replace(source, target):
        events.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_whole(tmp_path / "file", b"content")
    assert events == [("sync", len(b"content")), ("rename", "file"), ("sync", "folder")]


def test_nothing_is_written_in_any_other_way():
    root = Path(__file__).parents[1]
    ways = (
        r"write_text\(",
        r"write_bytes\(",
        r"savefig\((?!png)",
        r"np\.save",
        r"th\.save\(",
        r"open\([^)]*[\"'][wax]b?\+?[\"']",
    )
    writes = re.compile("|".join(ways))
    found = {
        f"{path.relative_to(root)}: {line.strip()}"
        for folder in ("sb3_mbmpo", "tuning")
        for path in (root / folder).rglob("*.py")
        for line in path.read_text().splitlines()
        if writes.search(line)
    }
    assert {line.partition(":")[0] for line in found} == {"sb3_mbmpo/common/atomic.py"}, found


def test_parts_of_the_dead_are_removed_and_those_of_the_living_are_not(tmp_path):
    path = tmp_path / "run[1].zip"
    (tmp_path / ".run[1].zip.00000000.part").write_bytes(b"of a process that was killed")
    (tmp_path / ".other.zip.00000000.part").write_bytes(b"of another file")
    with whole_file(path) as slow:
        slow.write(b"slow")
        write_whole(path, "quick")
        assert path.read_text() == "quick"
    assert path.read_text() == "slow", "complete, and the last one to be finished"
    assert sorted(file.name for file in tmp_path.iterdir()) == [".other.zip.00000000.part", "run[1].zip"]


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "x" * 200, "x" * 201])
def test_any_name_that_a_file_can_have(name, tmp_path):
    path = tmp_path / name
    part = tmp_path / f".{_short_name(path)}.00000000.part"
    part.write_bytes(b"of a process that was killed")
    write_whole(path, b"content")
    assert path.read_bytes() == b"content"
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_links_permissions_and_devices_stay_what_they_are(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    write_whole(link, b"new")
    assert link.is_symlink()
    assert (real.read_bytes(), real.stat().st_mode & 0o777) == (b"new", 0o640)
    write_whole(tmp_path / "fresh", b"")
    (tmp_path / "usual").write_bytes(b"")
    assert (tmp_path / "fresh").stat().st_mode == (tmp_path / "usual").stat().st_mode
    write_whole("/dev/null", b"nowhere")
    assert Path("/dev/null").is_char_device()
