"""Features that speak in the language model's own embeddings, and a language model that starts by listening to them.

Finding the one row of a page that a question names is slow to learn from nothing: queries, keys and values have to
agree on a code for every word. Here the encoder learns to say words as the embeddings that the text uses, and the
language model is drawn so that it looks for what it reads and passes on what it finds. Drawing attention near the
pattern that training would give it is known as mimetic initialisation (Trockman and Kolter, 2023); which pattern, for
cross-attention, is ours.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MllamaForConditionalGeneration

from .task import Head, Task

_SHARPNESS = 12.0
_QUIET = 1 / 16
_ALIKE = math.sqrt(0.5)
_PASSED_ON = 0.5
_SAID = 0.05


def turn(vectors: Tensor) -> Tensor:
    """Return vectors [..., width] with their halves swapped: unlike what they were, and undone by doing it again."""
    return vectors.roll(vectors.shape[-1] // 2, dims=-1)


class Spoken(nn.Module):
    """A head whose first classes are words: its logits are the cosines of a projected feature and each embedding.

    Cosines, since a feature that says its words and little else has the largest ones: queries can find it at once.
    """

    tokens: Tensor

    def __init__(self, task: Task[Any], head: Head) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.tensor([task.token(word) for word in head.words]), persistent=False)
        self.others = nn.Parameter(torch.randn(head.classes - len(head.words), task.settings.text_width))
        self._turned = head.turned

    def forward(self, projected: Tensor, embeddings: Tensor) -> Tensor:
        """Return logits [..., classes] of projected features; the embeddings themselves learn nothing by them."""
        table = torch.cat([embeddings.detach()[self.tokens], self.others])
        table = F.normalize(turn(table) if self._turned else table, dim=-1)
        return _SHARPNESS * F.normalize(projected, dim=-1) @ table.T


@torch.no_grad()
def listen(model: MllamaForConditionalGeneration, task: Task[Any]) -> None:
    """Change an untrained language model so that it looks for its own words and passes on what it finds.

    Half of the key heads of every cross-attention find features that say the token's word, the others features that
    say it turned. What they find is added to the token, and the output layer starts alike to the embeddings.
    """
    text, language = model.config.text_config, model.model.language_model
    groups, share = text.num_key_value_heads, text.num_attention_heads // text.num_key_value_heads
    embeddings = language.embed_tokens.weight
    # A word that begins an answer is another token than the same word after a space: they start alike.
    begins = torch.randn(text.hidden_size) * embeddings.std() * _ALIKE
    for word in dict.fromkeys(word for head in task.patches.values() for word in head.words if not word.isdigit()):
        first, *rest = task.tokenizer(word, add_special_tokens=False)["input_ids"]
        if not rest:
            embeddings[first] = _ALIKE * embeddings[task.token(word)] + begins
    for index in text.cross_attention_layers:
        attention = language.layers[index].cross_attn
        keys = attention.k_proj.weight.unflatten(0, (groups, -1))
        queries = torch.cat([keys[: groups // 2], turn(keys[groups // 2 :])])
        attention.q_proj.weight.copy_(queries.repeat_interleave(share, 0).flatten(0, 1))
        values = attention.v_proj.weight.unflatten(0, (groups, -1)).repeat_interleave(share, 0).flatten(0, 1)
        attention.o_proj.weight.add_(values.T * (_PASSED_ON / share))
    model.model.multi_modal_projector.weight.mul_(_QUIET)  # so that features say nothing but what they learn to
    model.lm_head.weight.copy_(_SAID * embeddings[: text.vocab_size])
