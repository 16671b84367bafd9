"""How much memory this process may have."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def usable_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may use: those of the machine, or the fewer of its container.

    A container's limit is that of the control group of this process, or of one above it; the kernel ends
    a process that passes it. A limit of the address space (``ulimit -v``) counts too.

    Args:
        root: where ``proc`` and ``sys`` are looked for.

    Source: cgroups(7); Linux, Documentation/admin-guide/cgroup-v2.rst ("memory.max") and
    cgroup-v1/memory.rst ("memory.limit_in_bytes").
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = (_number(path) for path in _limit_files(root))
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    most = [] if space == resource.RLIM_INFINITY else [space]
    return min([machine, *most, *(limit for limit in limits if limit is not None)])


def _limit_files(root: Path) -> Iterator[Path]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounted = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            folder, name = mounted, "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = mounted / "memory", "memory.limit_in_bytes"
        else:
            continue
        own = PurePosixPath(path)
        # Inside a container the path may be the host's, and the limit then lies where groups are mounted.
        for group in (own, *own.parents):
            yield folder / str(group).lstrip("/") / name


def _number(path: Path) -> int | None:
    """The limit a file states; None for "max", and where there is no such file."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
