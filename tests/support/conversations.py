"""Conversations, and what the model itself says of a continuation."""

from __future__ import annotations

import torch

from crosstrim.eval import conversations


def text(words):
    return {"type": "text", "text": words}


def user(*parts):
    content = [text(one) if isinstance(one, str) else {"type": "image", "image": one} for one in parts]
    return [{"role": "user", "content": content}]


def stock(model, processor, conversation, saying):
    """Log-probability and greediness from one plain forward pass over prompt and continuation."""
    prompt = conversations.encode(processor, [conversation])
    ids = processor.tokenizer.encode(saying, add_special_tokens=False)
    tokens = torch.cat([prompt["input_ids"], torch.tensor([ids], dtype=torch.long)], dim=1)
    inputs = {**prompt, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if "cross_attention_mask" in prompt:
        mask = prompt["cross_attention_mask"]
        inputs["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, len(ids), -1, -1)], 1)
    with torch.no_grad():
        logits = model(**inputs).logits[0].double().log_softmax(-1)
    rows = logits[prompt["input_ids"].shape[1] - 1 :][: len(ids)]
    return sum(row[one].item() for row, one in zip(rows, ids, strict=True)), all(
        row.argmax() == one for row, one in zip(rows, ids, strict=True)
    )
