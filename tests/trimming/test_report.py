from __future__ import annotations

import pytest

from crosstrim.trimming.report import format_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (209846272, "200 MiB")),
        *((1023 * 2**20, "1023 MiB"), (999.6 * 2**20, "1000 MiB"), (2**30, "1 GiB"), (5000 * 2**40, "5000 TiB")),
    ],
)
def test_sizes_for_people(count, text):
    assert format_bytes(count) == text
