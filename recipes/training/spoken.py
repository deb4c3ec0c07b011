"""Features that speak in the language model's own embeddings, and a language model that starts by listening to them.

Finding the one row of a page that a question names is slow to learn from nothing: queries, keys and values have to
agree on a code for every word. Here features learn to say words as the embeddings that the text uses, and the
language model is drawn so that it looks for what it reads and passes on what it finds. To draw attention near the
pattern that training would give it is known as mimetic initialisation (Trockman and Kolter, 2023); which pattern, for
cross-attention, is ours.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MllamaForConditionalGeneration

from .task import Task
from .tiles import IGNORE

_LOUD, _QUIET = 0.7, 0.2  # the first is how embeddings are drawn
_ALIKE = math.sqrt(0.5)  # of a word that begins an answer, how much is the word: half of its square
_PASSED_ON = 0.5  # of what a key head reads, how much its query heads together add to the token
_SAID = 0.05  # how much of its embedding the output layer has of a token


def turn(vectors: Tensor) -> Tensor:
    """Return vectors [..., width] with their halves swapped: unlike what they were, and undone by doing it again."""
    return vectors.roll(vectors.shape[-1] // 2, dims=-1)


class Speech(nn.Module):
    """What projected features are to be: the sum of a code for each thing that a patch is asked.

    The code of a word is its embedding, turned if its head is; everything else has a random one, quieter where it is
    no word.
    """

    def __init__(self, task: Task[Any], model: MllamaForConditionalGeneration) -> None:
        super().__init__()
        self._heads, self._model = task.patches, (model.model,)  # in a tuple: its parameters are not the speech's
        self._tokens = {name: [task.token(word) for word in head.words] for name, head in self._heads.items()}
        draw = torch.Generator().manual_seed(task.settings.seed)
        for name, head in task.patches.items():
            codes = torch.randn(head.classes - len(head.words), task.settings.text_width, generator=draw)
            self.register_buffer(name, codes * (_LOUD if head.words else _QUIET), persistent=False)

    def codes(self) -> dict[str, Tensor]:
        """Return by head the code of each class, [classes, width]; the embeddings learn nothing by it."""
        embeddings, found = self._model[0].language_model.embed_tokens.weight.detach(), {}
        for name, head in self._heads.items():
            table = torch.cat([embeddings[self._tokens[name]], self.get_buffer(name)])
            found[name] = turn(table) if head.turned else table
        return found

    def loss(self, features: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Return how far the projector's patches are from it, 1 where they are zero.

        A patch counts if all that it is to say in words is known, and every class of its first label counts alike.
        Any other label that is to be ignored adds no code. Zero where no patch counts.

        Args:
            features: Vision features [B, MAX_TILES, 1 + patches, features].
            batch: What every head should say.
        """
        said = self._model[0].multi_modal_projector(features[:, :, 1:])
        wanted, counted = torch.zeros_like(said), torch.ones(said.shape[:-1], dtype=torch.bool)
        for name, codes in self.codes().items():
            known = batch[name] != IGNORE
            wanted[known] += codes[batch[name][known]]
            if self._heads[name].words:
                counted &= known
        missed = (said - wanted)[counted].square().sum(-1) / wanted[counted].square().sum(-1)
        classes = batch[next(iter(self._heads))][counted]
        weights = 1 / classes.bincount()[classes]
        return (missed * weights).sum() / weights.sum().clamp(min=1e-9)


@torch.no_grad()
def listen(model: MllamaForConditionalGeneration, task: Task[Any]) -> None:
    """Change an untrained language model so that it looks for its own words and passes on what it finds.

    Half of the key heads of every cross-attention find features that say the token's word, the others features that
    say it turned. What they find is added to the token, and the output layer starts alike to the embeddings. The
    projector starts at zero.
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
    nn.init.zeros_(model.model.multi_modal_projector.weight)  # so that features say nothing but what they learn to
    model.lm_head.weight.copy_(_SAID * embeddings[: text.vocab_size])
