"""What the tests of loading share."""

from __future__ import annotations

import pytest

import crosstrim


def refused(error, *args, **options) -> str:
    """The words with which `crosstrim.load` refuses."""
    with pytest.raises(error) as caught:
        crosstrim.load(*args, **options)
    return str(caught.value)
