"""How much memory this process holds, as Linux counts it."""

from pathlib import Path

STATUS = Path("/proc/self/status")
ANONYMOUS, FILE = "RssAnon", "RssFile"


def resident_mb() -> dict[str, float]:
    """Return resident memory in MB of 10^6 bytes: ``rss_anon_mb`` the process's own, ``rss_file_mb`` mapped files."""
    sizes = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    anonymous, file = (int(sizes[key].split()[0]) * 1024 / 1e6 for key in (ANONYMOUS, FILE))
    return {"rss_anon_mb": round(anonymous, 1), "rss_file_mb": round(file, 1)}
