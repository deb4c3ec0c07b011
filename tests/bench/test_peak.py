"""What a peak says is what the work needed, whatever was left lying about before it."""

from __future__ import annotations

import gc
import sys

import pytest
import torch

from crosstrim.bench.peak import peak_mib

LARGE = 64 * 2**18  # float32 numbers of 64 MiB, which glibc maps on their own and returns at once


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_rubbish_that_is_swept_up_meanwhile_hides_nothing():
    cycle: list[object] = [torch.ones(LARGE)]
    cycle.append(cycle)
    del cycle

    def work() -> torch.Tensor:
        gc.collect()
        return torch.ones(LARGE // 2)

    _, peak = peak_mib(work)
    assert peak == pytest.approx(32, abs=4)
