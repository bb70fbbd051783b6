"""Threads of our own for row and feature ranges; each runs torch's operations single-threaded.

OpenMP's workers spin for milliseconds after each parallel region, and torch and numba each bring
an OpenMP of their own: alternating between them costs more than it gains. So no kernel here
enters an OpenMP region. A worker takes one range after another, multiplies on its own core, and
goes on with what lies in its cache.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

# (process, threads) -> pool: a forked child makes its own
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_making = threading.Lock()
_serial = threading.local()
_scratch = threading.local()


def count():
    """How many threads kernels use: torch's own setting, also inside :func:`serial`."""
    return getattr(_serial, "outside", None) or torch.get_num_threads()


@contextmanager
def serial(most=None):
    """Keep torch's own operations of this thread out of OpenMP, for the time of a training step.

    The setting is OpenMP's own, which each thread has for itself; only a thread that first uses
    torch meanwhile takes it over. Kernels use ``most`` threads, or as many as torch did.
    """
    outside = count()
    _serial.outside = most or outside
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _serial.outside = None
        torch.set_num_threads(outside)


def _begin():
    torch.get_num_threads()  # a thread takes the process's setting at its first use of torch
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


def _pool(workers):
    key = (os.getpid(), workers)
    if key in _pools:
        return _pools[key]
    with _making:
        if key not in _pools:
            was = torch.get_num_threads()
            barrier = threading.Barrier(workers + 1)
            pool = ThreadPoolExecutor(workers, thread_name_prefix="kernels", initializer=_begin)
            for _ in range(workers):
                pool.submit(barrier.wait)
            barrier.wait()  # every worker has begun, so that the setting they changed can be put back
            torch.set_num_threads(was)
            _pools[key] = pool
        return _pools[key]


def _forked():
    global _making
    _making = threading.Lock()  # the parent's may be held by a thread that the child hasn't got


os.register_at_fork(after_in_child=_forked)


def parallel(work, n, chunk):
    """Call ``work(start, end)`` for the ranges of ``chunk`` that make up ``0..n``.

    Ranges write to places of their own, so which thread takes which changes nothing.
    """
    if n <= chunk or count() == 1:
        for start in range(0, n, chunk):
            work(start, min(n, start + chunk))
        return
    starts = iter(range(0, n, chunk))

    def take():
        for start in starts:  # advancing an iterator is atomic
            work(start, min(n, start + chunk))

    workers = min(count(), -(-n // chunk))
    for done in [_pool(count()).submit(take) for _ in range(workers)]:
        done.result()


def scratch(name, shape, dtype):
    """A tensor of this thread's own that is used again at the next call; its contents are arbitrary."""
    size = 1
    for length in shape:
        size *= length
    kept = _scratch.__dict__.setdefault("kept", {})
    if name not in kept or kept[name].numel() < size or kept[name].dtype != dtype:
        kept[name] = torch.empty(size, dtype=dtype)
    return kept[name][:size].view(shape)
