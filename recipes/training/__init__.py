"""What the recipes share: a small Mllama, the lessons it is trained by, and stages that resume."""

import ctypes
import os

# Said before torch starts its threads: threads that spin while they wait starve every other job of a small machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks: activations come and go each step, and mapping them anew costs a fifth."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
