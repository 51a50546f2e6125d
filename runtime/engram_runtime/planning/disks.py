"""Figures of kinds of disks, for a box that isn't at hand."""

from engram_runtime.tables.disk import AT_ONCE, DiskFacts

MEASURED = "measured"


def _disk(*, one_s: float, batch_s: float, reads_per_s: float, bytes_per_s: float) -> DiskFacts:
    """Return a disk of which only medians are known."""
    return DiskFacts(
        one_p50_s=one_s,
        one_p99_s=one_s,
        batch_p50_s=batch_s,
        batch_p99_s=batch_s,
        reads_per_s=reads_per_s,
        bytes_per_s=bytes_per_s,
        measured_at=0.0,
    )


DISKS = {
    "nvme": _disk(one_s=106e-6, batch_s=159e-6, reads_per_s=92e3, bytes_per_s=1.5e9),
    "sata": _disk(one_s=1 / 13e3, batch_s=AT_ONCE / 80e3, reads_per_s=80e3, bytes_per_s=560e6),
    "sd": _disk(one_s=1 / 1500, batch_s=AT_ONCE / 1500, reads_per_s=1500.0, bytes_per_s=50e6),
    "hdd": _disk(one_s=1 / 150, batch_s=AT_ONCE / 150, reads_per_s=150.0, bytes_per_s=150e6),
}
SOURCES = {
    "nvme": "a cloud machine's NVMe by io_uring and O_DIRECT: 106 us for one 4 KiB read, 159 us for 16, 1.5 GB/s",
    "sata": "data sheet of Samsung's 870 EVO: 13,000 reads a second one by one, 98,000 with 32 in flight (here 80,000 "
    "with 16), 560 MB/s",
    "sd": "the least of SD Association's class A1, 1,500 reads a second, and 50 MB/s of a card in UHS-I's DDR50",
    "hdd": "150 reads a second and 150 MB/s, as of a turning disk of 7,200 rpm",
}
