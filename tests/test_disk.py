"""What lies under a file and what its disk gives: made-up machines, and figures that are remembered."""

import dataclasses
import json
import logging
import os
import re
import time
from pathlib import Path

import pytest
from tests.disks import VDA, flash_disk

from engram_runtime import cpu, memory
from engram_runtime.memory import FreeMemory, free_memory
from engram_runtime.tables import disk, place
from engram_runtime.tables.disk import VALID_S, DiskFacts, cache_file, disk_facts, measure_disk
from engram_runtime.tables.place import DISK, FUSE, MEMORY, NETWORK, REMOVABLE, Place, place_of

MIB = 1 << 20

# Where a file lies.


def machine_with(monkeypatch: pytest.MonkeyPatch, root: Path, mounts: str, disks: dict[str, dict[str, str]]) -> None:
    """Make ``/proc/self/mountinfo`` say ``mounts`` and disks of ``major:minor path/below/devices`` hold files."""
    (root / "mountinfo").write_text(mounts)
    (root / "block").mkdir()
    for name, files in disks.items():
        number, _, path = name.partition(" ")
        folder = root / "devices" / path
        for file, text in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
        (root / "block" / number).symlink_to(folder)
    monkeypatch.setattr(place, "MOUNTS", root / "mountinfo")
    monkeypatch.setattr(place, "DEVICES", root / "block")


SDA = {"size": "1000\n", "removable": "0\n", "device/model": "A disk  \n", "wwid": "naa.5\n"}
DISKS = {
    "8:0 pci/block/sda": SDA,
    "8:1 pci/block/sda/sda1": {"partition": "1\n"},
    "8:16 pci/usb2/block/sdb": {"size": "2000\n", "removable": "0\n"},
    "8:32 pci/block/sdc": {"size": "3000\n", "removable": "1\n"},
    "8:48 pci/block/sdd": {"size": "4000\n", "device/wwid/folder": ""},  # a folder can't be read, as a wwid at times
}
SDA_IDENTITY = "sda naa.5 A disk 1000"


def line(device: str, point: str, file_system: str, source: str = "source", optional: str = "shared:1 ") -> str:
    return f"36 35 {device} / {point} rw,noatime {optional}- {file_system} {source} rw\n"


@pytest.mark.parametrize(
    ("mounts", "found"),
    [
        (line("8:0", "/", "ext4"), (DISK, "ext4", "sda", SDA_IDENTITY)),
        (line("8:1", "/", "xfs", optional=""), (DISK, "xfs", "sda", SDA_IDENTITY)),
        (line("8:16", "/", "exfat"), (REMOVABLE, "exfat", "sdb", "sdb 2000")),
        (line("8:32", "/", "vfat"), (REMOVABLE, "vfat", "sdc", "sdc 3000")),
        (line("8:48", "/", "ext4"), (DISK, "ext4", "sdd", "sdd 4000")),
        (line("0:50", "/", "nfs4", "host:/export"), (NETWORK, "nfs4", "host:/export", "0:50 nfs4 host:/export")),
        (line("0:51", "/", "fuse.sshfs", "host:"), (FUSE, "fuse.sshfs", "host:", "0:51 fuse.sshfs host:")),
        (line("0:52", "/", "tmpfs", "tmpfs"), (MEMORY, "tmpfs", "tmpfs", "0:52 tmpfs tmpfs")),
        (line("0:53", "/", "overlay", "overlay"), (DISK, "overlay", "overlay", "0:53 overlay overlay")),
        (line("8:0", "/", "ext4") + line("0:52", "/data", "tmpfs"), (MEMORY, "tmpfs", "source", "0:52 tmpfs source")),
        (line("8:0", "/", "ext4") + line("0:52", "/dat", "tmpfs"), (DISK, "ext4", "sda", SDA_IDENTITY)),
        (line("8:0", "/data", "ext4") + line("0:52", "/", "tmpfs"), (DISK, "ext4", "sda", SDA_IDENTITY)),
        (line("0:52", "/data", "tmpfs") + line("8:0", "/data", "ext4"), (DISK, "ext4", "sda", SDA_IDENTITY)),
        (line("0:50", "/other", "nfs4"), (DISK, "unknown", "unknown", "0:0 unknown unknown")),
    ],
)
def test_a_file_lies_where_the_last_of_the_longest_mounts_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounts: str, found: tuple[str, str, str, str]
) -> None:
    machine_with(monkeypatch, tmp_path, mounts, DISKS)
    assert dataclasses.astuple(place_of(Path("/data/rows"))) == found


def test_links_are_followed_and_escapes_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a b" / "rows")
    point = str(tmp_path.resolve() / "a b").replace(" ", r"\040")
    machine_with(monkeypatch, tmp_path, line("8:0", "/", "ext4") + line("0:9", point, "nfs", r"a\040b:/"), DISKS)
    assert place_of(tmp_path / "link") == Place(
        kind=NETWORK, file_system="nfs", device="a b:/", identity="0:9 nfs a b:/"
    )


def test_links_in_a_circle_lie_where_the_first_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "link")
    machine_with(monkeypatch, tmp_path, line("8:0", "/", "ext4"), DISKS)
    assert place_of(tmp_path / "link").device == "sda"


def test_this_machine_has_places() -> None:
    assert place_of(Path("/proc/self/mountinfo")).file_system == "proc"


# What its disk gives.


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of read is made once."""
    for name in ("ONE_S", "BATCH_S", "FLOW_S", "LOADING_S", "FLOW_CALL_S"):
        monkeypatch.setattr(disk, name, 0.0)


@pytest.mark.usefixtures("quick")
def test_a_disk_is_measured_by_reading_a_file(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(os.urandom(4 * MIB))
    try:
        facts = measure_disk(tmp_path / "rows")
    except OSError as error:
        pytest.skip(f"no direct reads here: {error}")
    assert min(dataclasses.astuple(facts)) > 0
    assert abs(facts.measured_at - time.time()) < 60


def test_a_file_too_small_says_nothing_of_its_disk(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(bytes(4 * MIB - 1))
    with pytest.raises(OSError, match=re.escape(f"{tmp_path / 'rows'} is too small")):
        measure_disk(tmp_path / "rows")


def test_a_pipe_in_place_of_a_file_is_too_small_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows")
    with pytest.raises(OSError, match=re.escape(f"{tmp_path / 'rows'} is too small")):
        measure_disk(tmp_path / "rows")


def test_a_file_with_holes_says_nothing_of_its_disk(tmp_path: Path) -> None:
    with (tmp_path / "rows").open("wb") as file:
        file.truncate(8 * MIB)
    with pytest.raises(OSError, match=re.escape(f"{tmp_path / 'rows'} has holes, which no disk reads")):
        measure_disk(tmp_path / "rows")


# What is remembered.


class Probe:
    """Counts how often a disk is measured."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, path: Path) -> DiskFacts:
        self.times += 1
        return flash_disk()


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Probe:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(disk, "measure_disk", made := Probe())
    return made


ROWS = Path("rows")
SDB = dataclasses.replace(VDA, device="sdb", identity="sdb 7")


def test_a_disk_is_measured_once_and_another_by_itself(probe: Probe, tmp_path: Path) -> None:
    first = disk_facts(ROWS, VDA)
    assert disk_facts(ROWS, VDA) == first
    assert probe.times == 1
    disk_facts(ROWS, SDB)
    disk_facts(ROWS, VDA)
    assert probe.times == 2
    assert [path.name for path in cache_file().parent.iterdir()] == ["disks.json"]


def remembered(tmp_path: Path, value: object) -> None:
    cache_file().parent.mkdir()
    cache_file().write_text(value if isinstance(value, str) else json.dumps(value))


SOUND = dataclasses.asdict(flash_disk())
DAMAGED: list[object] = [
    "",
    "{",
    "[]",
    "{}" + " " * (5 << 20),
    {VDA.identity: 1},
    {VDA.identity: {}},
    {VDA.identity: SOUND | {"more": 1.0}},
    {VDA.identity: SOUND | {"one_p50_s": -1.0}},
    {VDA.identity: SOUND | {"bytes_per_s": 0.0}},
    {VDA.identity: SOUND | {"bytes_per_s": "fast"}},
    {VDA.identity: SOUND | {"bytes_per_s": True}},
    '{"' + VDA.identity + '": {"one_p50_s": NaN}}',
]


@pytest.mark.parametrize("value", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_memory_is_measured_anew_and_mended(probe: Probe, tmp_path: Path, value: object) -> None:
    remembered(tmp_path, value)
    assert disk_facts(ROWS, VDA) == disk_facts(ROWS, VDA)
    assert probe.times == 1


def test_damage_to_one_disk_leaves_the_others(probe: Probe, tmp_path: Path) -> None:
    remembered(tmp_path, {VDA.identity: SOUND, SDB.identity: []})
    disk_facts(ROWS, SDB)
    disk_facts(ROWS, VDA)
    assert probe.times == 1


@pytest.mark.parametrize(("age_s", "times"), [(VALID_S - 60, 0), (VALID_S + 60, 1), (-3600, 1)])
def test_what_is_old_or_of_the_future_is_measured_anew(probe: Probe, tmp_path: Path, age_s: float, times: int) -> None:
    remembered(tmp_path, {VDA.identity: SOUND | {"measured_at": time.time() - age_s}})
    disk_facts(ROWS, VDA)
    assert probe.times == times


def test_what_cant_be_kept_is_said(
    probe: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        disk_facts(ROWS, VDA)
    assert caplog.messages == [
        f"figures of disk vda can't be kept, they are measured at every start: [Errno 20] Not a directory: "
        f"'{tmp_path}/file/engram-edge'"
    ]


def test_a_user_without_home_is_told_what_to_set(
    probe: Probe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_home() -> Path:
        raise RuntimeError

    monkeypatch.setenv("XDG_CACHE_HOME", "relative/paths/are/ignored")
    monkeypatch.setattr(Path, "home", no_home)
    with caplog.at_level(logging.WARNING):
        disk_facts(ROWS, VDA)
    assert caplog.messages[0].endswith("[Errno 2] no home folder; set XDG_CACHE_HOME")


# Memory.

V2_STAT = "anon 5\nfile 900\ninactive_file 300\nactive_file 100\n"
V1_STAT = "cache 9\ninactive_file 1\nactive_file 1\ntotal_inactive_file 300\ntotal_active_file 100\n"


def version2(folder: str, limit: str, usage: int) -> dict[str, str]:
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{usage}\n",
        f"{folder}/memory.stat": V2_STAT,
    }


def version1(folder: str, limit: int, usage: int) -> dict[str, str]:
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{usage}\n",
        f"{folder}/memory.stat": V1_STAT,
    }


MACHINE = FreeMemory(num_bytes=1024 * 1000, of_group=False)


@pytest.mark.parametrize(
    ("own", "files", "found"),
    [
        ("", {}, MACHINE),
        ("0::/\n", {}, MACHINE),
        ("0::/a\n", version2("a", "max", 100), MACHINE),
        ("0::/a\n", version2("a", "5000", 1000), FreeMemory(num_bytes=4400, of_group=True)),
        (
            "0::/a/b\n",
            version2("a", "5000", 1000) | version2("a/b", "max", 9),
            FreeMemory(num_bytes=4400, of_group=True),
        ),
        ("0::/a\n", version2("b", "5000", 1000), MACHINE),
        ("0::/a\n", version2("a", "5000", 6000), FreeMemory(num_bytes=0, of_group=True)),
        ("0::/a\n", version2("a", str(1 << 40), 1000), MACHINE),
        ("4:memory:/a\n0::/\n", version1("memory/a", 5000, 1000), FreeMemory(num_bytes=4400, of_group=True)),
        ("4:memory:/a\n", version1("memory/a", 9223372036854771712, 1000), MACHINE),
        ("4:memory:/of/the/host\n", version1("memory", 5000, 1000), FreeMemory(num_bytes=4400, of_group=True)),
        ("4:cpu:/a\n", version1("memory/a", 5000, 1000), MACHINE),
    ],
)
def test_the_least_of_machine_and_control_groups_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str], found: FreeMemory
) -> None:
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text)
    (tmp_path / "own").write_text(own)
    (tmp_path / "meminfo").write_text("MemTotal:        4000 kB\nMemAvailable:    1000 kB\nHugePages_Total:  0\n")
    monkeypatch.setattr(cpu, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cpu, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    assert free_memory() == found


def test_this_machine_has_free_memory() -> None:
    assert 0 < free_memory().num_bytes < cpu.physical_memory()
