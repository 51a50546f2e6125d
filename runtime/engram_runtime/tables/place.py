"""Where a file lies: on which kind of file system, and on which disk."""

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
DEVICES = Path("/sys/dev/block")
DISK, MEMORY, NETWORK, FUSE, REMOVABLE = "disk", "memory", "network", "FUSE", "removable"
IN_MEMORY = frozenset({"tmpfs", "ramfs"})
ON_NETWORK = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "gpfs", "lustre", "nfs", "nfs4", "smb3", "smbfs", "vboxsf", "virtiofs"}
)
BUS = re.compile(r"usb[0-9]+")  # in the path of a device: disks behind it can be unplugged, whatever they say
IDENTITY_FILES = ("wwid", "serial", "device/wwid", "device/serial", "device/model", "size")  # as far as a disk has them


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a file lies on.

    Attributes:
        kind: `DISK`, `MEMORY`, `NETWORK`, `FUSE` or `REMOVABLE`.
        file_system: its type, such as ``ext4``.
        device: name of the disk, such as ``vda``, or what is mounted where there is none.
        identity: text that another disk in its place would not have.
    """

    kind: str
    file_system: str
    device: str
    identity: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mount:
    """A line of mountinfo, see proc_pid_mountinfo(5)."""

    device: str  # major:minor
    point: Path
    file_system: str
    source: str


NO_MOUNT = _Mount(device="0:0", point=Path("/"), file_system="unknown", source="unknown")  # as a chroot may have none


def place_of(path: Path) -> Place:
    """Return where a file lies, followed through links; of a file that isn't there, where it would."""
    mount = _mount_of(Path(os.path.realpath(path)))  # unlike Path.resolve it bears links in a circle
    disk = _disk(mount)
    if disk is None:
        identity = f"{mount.device} {mount.file_system} {mount.source}"
        return Place(kind=_kind(mount), file_system=mount.file_system, device=mount.source, identity=identity)
    kind = REMOVABLE if _can_be_removed(disk) else _kind(mount)
    texts = [text for name in IDENTITY_FILES if (text := _text(disk / name))]
    return Place(kind=kind, file_system=mount.file_system, device=disk.name, identity=" ".join([disk.name, *texts]))


def _mount_of(path: Path) -> _Mount:
    """Return the mount a path is below: the last one of the longest, as later ones hide those before."""
    below = [
        mount
        for mount in map(_parse, MOUNTS.read_text(errors="surrogateescape").splitlines())
        if path.is_relative_to(mount.point)
    ]
    return max(reversed(below), key=lambda mount: len(mount.point.parts), default=NO_MOUNT)


def _parse(line: str) -> _Mount:
    own, _, rest = line.partition(" - ")
    device, _, point = own.split(" ")[2:5]
    file_system, source = rest.split(" ")[:2]
    return _Mount(device=device, point=Path(_unescape(point)), file_system=file_system, source=_unescape(source))


def _unescape(text: str) -> str:
    """Undo the octal escapes of spaces, tabs, newlines and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _kind(mount: _Mount) -> str:
    if mount.file_system in IN_MEMORY:
        return MEMORY
    if mount.file_system in ON_NETWORK:
        return NETWORK
    return FUSE if mount.file_system.startswith("fuse") else DISK


def _disk(mount: _Mount) -> Path | None:
    """Return the folder in /sys of the disk under a mount, of a partition the whole one; None where there is none."""
    for number in (mount.device, _device_number(mount.source)):
        if number is not None and (DEVICES / number).exists():
            folder = (DEVICES / number).resolve()
            return folder.parent if (folder / "partition").exists() else folder
    return None


def _device_number(source: str) -> str | None:
    """Return major:minor of a block device; btrfs mounts one under a number of its own."""
    try:
        status = Path(source).stat()
    except OSError:
        return None
    number = status.st_rdev
    return f"{os.major(number)}:{os.minor(number)}" if stat.S_ISBLK(status.st_mode) else None


def _can_be_removed(disk: Path) -> bool:
    return _text(disk / "removable") == "1" or any(BUS.fullmatch(part) for part in disk.parts)


def _text(path: Path) -> str:
    """Return what a file of /sys says; nothing where it isn't there or the disk, asked for it, doesn't know."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
