"""Independent statements of what trimming must do: written with loops and masks, sharing no code with the package."""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from tests.support.tiny import CROSS_LAYERS, FEATURES_PER_IMAGE, FEATURES_PER_TILE


def kept_by_loops(saliency, visible, k=None, keep=None, k_base="visible", size=None):
    """METHOD: per image every head takes its top-k, the union stays; `keep` takes (best rank, -strongest, index)."""
    kept = torch.zeros_like(visible)
    size = size or visible.shape[1]
    for sample in range(visible.shape[0]):
        for start in range(0, visible.shape[1], size):
            seen = [n for n in range(start, start + size) if visible[sample, n]]
            scores = [saliency[sample, head].tolist() for head in range(saliency.shape[1])]
            orders = [sorted(seen, key=lambda n, s=s: (-s[n], n)) for s in scores]
            best = {n: min(order.index(n) for order in orders) for n in seen}
            if k is not None:
                top = math.ceil(Fraction(str(k)) * (len(seen) if k_base == "visible" else size))
                chosen = {n for order in orders for n in order[:top]}
            elif keep is not None:
                budget = keep if isinstance(keep, int) else math.ceil(Fraction(str(keep)) * len(seen))
                chosen = sorted(seen, key=lambda n: (best[n], -max(s[n] for s in scores), n))[:budget]
            else:
                chosen = seen
            kept[sample, list(chosen)] = True
    return kept


def saliency_by_loops(queries, keys, visible, rating, scale):
    batch, heads, _rows, _ = queries.shape
    result = torch.zeros(batch, heads, keys.shape[2], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            key = keys[b, h * keys.shape[1] // heads].double()
            for t in range(queries.shape[2]):
                if rating[b, t] and visible[b, t].any():
                    scores = (key @ queries[b, h, t].double()) * scale
                    result[b, h] += scores.masked_fill(~visible[b, t], -math.inf).softmax(-1)
    return result


def feature_visibility(batch):
    """[B, T, N] bool from the processor's tile mask."""
    tiles = batch["cross_attention_mask"].flatten(2).bool()
    return tiles.repeat_interleave(FEATURES_PER_TILE, dim=2)


def leader_attention(model, batch):
    """[B, Hq, T, N] attention of the first cross-attention layer of the untrimmed model, its own eager weights."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = model(**batch, use_cache=False, output_attentions=True)
    finally:
        model.set_attn_implementation(implementation)
    return out.attentions[CROSS_LAYERS[0]].float()


def kept_features(model, batch, rating=None, **knobs):
    """[B, N] bool: what must stay, from the untrimmed model alone."""
    seen = feature_visibility(batch)
    real = batch["attention_mask"].bool()
    rating = real if rating is None else rating & real
    weights = leader_attention(model, batch)
    saliency = (weights * (rating & seen.any(-1))[:, None, :, None]).sum(2)
    visible = (seen & real.unsqueeze(-1)).any(1)
    return kept_by_loops(saliency, visible, size=FEATURES_PER_IMAGE, **knobs)


def masked_logits(model, batch, kept, generated, trim_first_layer=True):
    """Logits [B, T0 + G, V] of the untrimmed model on prompt + generated tokens, no cache, with what was dropped
    masked to -inf in every follower, and in the leader for the generated rows."""
    prompt_length = batch["input_ids"].shape[1]
    grown = dict(batch)
    grown["input_ids"] = torch.cat([batch["input_ids"], generated], dim=1)
    grown["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(generated)], dim=1)
    last = batch["cross_attention_mask"][:, -1:].expand(-1, generated.shape[1], -1, -1)
    grown["cross_attention_mask"] = torch.cat([batch["cross_attention_mask"], last], dim=1)
    dropped = ~kept[:, None, None]

    def hide_everywhere(module, args, kwargs):
        mask = kwargs["cross_attention_mask"]
        kwargs["cross_attention_mask"] = mask.masked_fill(dropped, -torch.inf)
        return args, kwargs

    def hide_from_generated(module, args, kwargs):
        mask = kwargs["cross_attention_mask"].clone()
        mask[:, :, prompt_length:] = mask[:, :, prompt_length:].masked_fill(dropped, -torch.inf)
        kwargs["cross_attention_mask"] = mask
        return args, kwargs

    layers = model.model.language_model.layers
    handles = [layers[i].register_forward_pre_hook(hide_everywhere, with_kwargs=True) for i in CROSS_LAYERS[1:]]
    if trim_first_layer:
        leader = layers[CROSS_LAYERS[0]]
        handles.append(leader.register_forward_pre_hook(hide_from_generated, with_kwargs=True))
    try:
        with torch.no_grad():
            return model(**grown, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
