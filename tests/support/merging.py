"""What merging must do, stated with loops and hooks on the untrimmed model, sharing no code with the package."""

from __future__ import annotations

import contextlib
import math

import torch

from tests.support import oracle, passes
from tests.support.tiny import CROSS_LAYERS, FEATURES_PER_IMAGE


def groups_by_loops(keys, visible, kept, size):
    """Per sample {kept feature: its group}: what is dropped goes where the cosine of the leader's keys is largest.

    Args:
        keys: [B, Hkv, N, D].
        visible: [B, N] bool.
        kept: [B, N] bool.
        size: features of one image.
    """
    samples = []
    for sample in range(len(keys)):
        joined = keys[sample].double().transpose(0, 1).flatten(1)
        groups = {n: [n] for n in range(len(joined)) if kept[sample, n]}
        for n in range(len(joined)):
            near = [m for m in groups if m // size == n // size]
            if visible[sample, n] and not kept[sample, n] and near:
                cosines = {m: float(torch.cosine_similarity(joined[n], joined[m], dim=0)) for m in near}
                groups[min(near, key=lambda m, cosines=cosines: (-cosines[m], m))].append(n)
        samples.append(groups)
    return samples


def mean_by_loops(features, saliency, group):
    """[C]: the mean over a group, weighted by saliency [Hq, N] summed over heads; plain where all of it is 0."""
    weights = [float(saliency[:, n].double().sum()) for n in group]
    if sum(weights) == 0:
        weights = [1.0] * len(group)
    return sum(w * features[n].double() for w, n in zip(weights, group, strict=True)) / sum(weights)


def leaders_view(model, batch):
    """What the untrimmed first cross-attention layer computes: keys [B, Hkv, N, D] and saliency [B, Hq, N]."""
    seen = []
    leader = model.model.language_model.layers[CROSS_LAYERS[0]].cross_attn
    handle = leader.k_norm.register_forward_hook(lambda module, args, output: seen.append(output))
    weights = oracle.leader_attention(model, batch)
    handle.remove()
    rating = batch["attention_mask"].bool() & oracle.feature_visibility(batch).any(-1)
    return seen[0], (weights * rating[:, None, :, None]).sum(2)


def groups_of(model, batch, kept):
    """`groups_by_loops` on what the untrimmed model computes."""
    keys, _ = leaders_view(model, batch)
    return groups_by_loops(keys, oracle.feature_visibility(batch).any(1), kept, FEATURES_PER_IMAGE)


@contextlib.contextmanager
def merged_in(model, layers, groups, saliency):
    """Within, kept features of `layers` read as means of their groups, and weigh as many features as those have."""

    def merge(module, args, kwargs):
        states, mask = kwargs["cross_attention_states"], kwargs["cross_attention_mask"].clone()
        features = states.reshape(len(groups), -1, states.shape[-1])
        means = features.clone()
        for sample, of_sample in enumerate(groups):
            for n, group in of_sample.items():
                means[sample, n] = mean_by_loops(features[sample], saliency[sample], group)
                mask[sample, :, :, n] += math.log(len(group))
        return args, kwargs | {"cross_attention_states": means.view_as(states), "cross_attention_mask": mask}

    with passes.hooked(model, layers, merge):
        yield


def merged_logits(model, batch, kept, generated, trim_first_layer=True):
    """As `oracle.masked_logits`, with what was dropped folded into what stays."""
    _, saliency = leaders_view(model, batch)
    with merged_in(model, CROSS_LAYERS[1:], groups_of(model, batch, kept), saliency):
        return oracle.masked_logits(model, batch, kept, generated, trim_first_layer)
