"""Which file the memory at an address is."""

from pathlib import Path

import pytest


def mapped_file(address: int) -> Path | None:
    """Return the file that is mapped at an address of this process; None where none is."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("mapped files are listed by Linux alone")
    for line in maps.read_text().splitlines():
        start, end = (int(edge, 16) for edge in line.split()[0].split("-"))
        if start <= address < end:
            parts = line.split(maxsplit=5)
            return Path(parts[5]) if len(parts) == 6 and parts[5].startswith("/") else None
    return None
