"""Which text rows rate the image features."""

from __future__ import annotations

import torch

from crosstrim.errors import InputError


def real_rows(
    attention_mask: torch.Tensor | None, batch: int, rows: int, device: torch.device, past: int | None = None
) -> torch.Tensor:
    """The rows that hold a token and not padding.

    Args:
        attention_mask: [B, S] with 1 for tokens and S >= rows, whose last `rows` columns are the present rows;
            [B, 1, rows, S], bool or additive, in which padding does not attend to itself; or None, which
            `generate` makes of a mask that is all ones.
        batch: B.
        rows: T, rows of this forward pass.
        device: of the result.
        past: tokens before the present rows; None: S - T, which it is unless a static cache has room left.

    Returns:
        [B, T] bool.

    Raises:
        InputError: the mask has another form.
    """
    if attention_mask is None:
        return torch.ones(batch, rows, dtype=torch.bool, device=device)
    if attention_mask.dim() == 2 and attention_mask.shape[1] >= rows:
        return attention_mask[:, -rows:].to(device) > 0
    if attention_mask.dim() == 4 and attention_mask.shape[2] == rows:
        past = max(attention_mask.shape[3] - rows, 0) if past is None else past
        itself = attention_mask[:, 0].diagonal(offset=past, dim1=-2, dim2=-1).to(device)
        return itself if itself.dtype == torch.bool else itself == 0
    raise InputError(
        f"attention_mask of shape {tuple(attention_mask.shape)} for {rows} rows must be [B, S] or [B, 1, T, S]."
    )


def last_turn_rows(
    token_ids: torch.Tensor, image_token_id: int, user_turn_ids: tuple[int, ...] | None
) -> torch.Tensor:
    """The rows after the last image or the last opening of a user turn, whichever comes later. Ours.

    A sample with neither, or with nothing after it, is rated by all its rows.

    Args:
        token_ids: [B, T] int.
        image_token_id: id of `<|image|>`.
        user_turn_ids: ids that open a user turn; None or empty: only images count.

    Returns:
        [B, T] bool.
    """
    positions = torch.arange(token_ids.shape[1], device=token_ids.device)
    ends = torch.where(token_ids == image_token_id, positions + 1, 0)
    if user_turn_ids and len(user_turn_ids) <= token_ids.shape[1]:
        opening = torch.tensor(user_turn_ids, device=token_ids.device)
        opens = (token_ids.unfold(1, len(user_turn_ids), 1) == opening).all(-1)
        turn_ends = torch.where(opens, positions[: opens.shape[1]] + len(user_turn_ids), 0)
        ends = torch.nn.functional.pad(turn_ends, (0, len(user_turn_ids) - 1)).maximum(ends)
    start = ends.amax(1, keepdim=True)
    start = torch.where(start < token_ids.shape[1], start, 0)
    return positions >= start
