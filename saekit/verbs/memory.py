"""Peak anonymous memory of this process, watched from a thread."""

import ctypes
import sys
import threading
from pathlib import Path

INTERVAL = 0.005  # seconds between looks: shorter than any buffer that matters lives

# of malloc.h: one arena, and fixed limits for what is mapped by itself and given back at once. Left to
# itself glibc raises the limit with what it sees (up to 32 MB, where a harvest still grew by a quarter
# from 60k to 600k tokens), and large buffers then leave holes in the heap.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGE = 4 << 20


def steady_malloc() -> None:
    """Keep glibc's heap from growing with time: to be called before anything large is allocated."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # musl has none
            mallopt(M_ARENA_MAX, 1)
            mallopt(M_MMAP_THRESHOLD, LARGE)
            mallopt(M_TRIM_THRESHOLD, LARGE)


def anonymous_bytes() -> int:
    """Resident anonymous memory now (RssAnon); where the system doesn't tell, the resident set."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024
    import psutil  # a dependency elsewhere than on Linux

    return int(psutil.Process().memory_info().rss)


class PeakAnonymous:
    """``with PeakAnonymous() as peak: ...`` then ``peak.bytes``."""

    def __enter__(self) -> "PeakAnonymous":
        self.bytes, self._done = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
