"""How much memory this process holds, as Linux counts it."""

from pathlib import Path

STATUS = Path("/proc/self/status")
ANONYMOUS, FILE, SHARED = "RssAnon", "RssFile", "RssShmem"


def resident_mb() -> dict[str, float]:
    """Return resident memory in MB of 10^6 bytes: ``rss_anon_mb`` the process's own, ``rss_file_mb`` mapped files.

    Shared memory counts as files, which it is where a bundle lies on a tmpfs.
    """
    sizes = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    anonymous, file, shared = (int(sizes[key].split()[0]) * 1024 / 1e6 for key in (ANONYMOUS, FILE, SHARED))
    return {"rss_anon_mb": round(anonymous, 1), "rss_file_mb": round(file + shared, 1)}
