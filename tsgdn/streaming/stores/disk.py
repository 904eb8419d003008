"""What the stores need of the disk: its kind, locks that keep others out, and writes that have arrived."""

import fcntl
import os
import re
from pathlib import Path

REMOTE = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "ncpfs", "fuse.sshfs"}
"""Kinds of file systems on which SQLite can lose data."""


def filesystem(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The kind of file system that a folder lies on, empty where the system does not tell."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return ""
    place, best, kind = folder.resolve(), -1, ""
    for line in lines:
        left, _, right = line.partition(" - ")
        fields = left.split()
        if len(fields) < 5 or not right:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4]))
        if place.is_relative_to(point) and len(point.parts) >= best:  # of two on one point the later one shows
            best, kind = len(point.parts), right.split()[0]
    return kind


def locked(path: Path, *, fresh: bool = False) -> int | None:
    """A handle that holds the lock file, None if another does; `fresh` puts a new file in the place of that one's."""
    name = path.with_name(f"{path.name}.{os.getpid()}") if fresh else path
    handle = os.open(name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if fresh:
            os.replace(name, path)
        same = os.path.samestat(os.fstat(handle), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        same = False
    except OSError:
        os.close(handle)
        raise
    if same:
        return handle
    os.close(handle)
    return None


def sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
