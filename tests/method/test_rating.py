from __future__ import annotations

import pytest
import torch

from crosstrim.errors import InputError
from crosstrim.method.rating import last_turn_rows, real_rows

CPU = torch.device("cpu")


def test_real_rows_of_every_form_of_mask():
    two = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    expected = two.bool()
    assert torch.equal(real_rows(two, 2, 4, CPU), expected)
    assert torch.equal(real_rows(two, 2, 3, CPU), expected[:, 1:])
    assert real_rows(None, 2, 4, CPU).all()
    causal = torch.ones(4, 4).tril().bool()
    allowed = causal & two.bool()[:, None, None, :]
    assert torch.equal(real_rows(allowed, 2, 4, CPU), expected)
    additive = torch.zeros(2, 1, 4, 4).masked_fill(~allowed, -1e30)
    assert torch.equal(real_rows(additive, 2, 4, CPU), expected)
    with_past = torch.cat([torch.ones(2, 1, 4, 3, dtype=torch.bool), allowed], dim=-1)
    assert torch.equal(real_rows(with_past, 2, 4, CPU), expected)


def test_a_mask_of_another_form_is_named():
    with pytest.raises(InputError, match=r"\(2, 3\) for 4 rows"):
        real_rows(torch.ones(2, 3), 2, 4, CPU)


IMAGE, TURN = 99, (7, 8)


@pytest.mark.parametrize(
    ("ids", "turn", "first"),
    [
        ([1, IMAGE, 3, 4], None, 2),
        ([1, IMAGE, 3, IMAGE, 5], None, 4),
        ([1, IMAGE, 3, 7, 8, 5, 6], TURN, 5),
        ([1, 7, 8, IMAGE, 5, 6], TURN, 4),
        ([1, IMAGE, 3, 7, 8, 5, 6], None, 2),
        ([1, 2, 3], TURN, 0),
        ([1, 2, IMAGE], None, 0),
        ([7, 8], TURN, 0),
        ([7], TURN, 0),
    ],
)
def test_the_last_turn_begins_after_the_last_image_or_turn(ids, turn, first):
    rows = last_turn_rows(torch.tensor([ids]), IMAGE, turn)
    assert rows[0].tolist() == [position >= first for position in range(len(ids))]
