"""What a row of a batch may say next: its grammar, its draw, and how likely its tokens were."""

from __future__ import annotations

import secrets
from typing import Any

import torch
from tokenizers import decoders

from crosstrim.server.chat import Chat, Likely, Token

_LEAST = -9999.0
"""A log-probability for what cannot be; JSON has no infinity. OpenAI's."""


class Chooser:
    """One row's next tokens.

    A row never looks at others: its seed, its grammar and its logits alone decide, whoever is in its batch.

    Args:
        chat: the request.
        device: of the logits.
        texts: of tokens.
    """

    def __init__(self, chat: Chat, device: torch.device, texts: TokenTexts) -> None:
        self._chat = chat
        self._texts = texts
        self._draws = _generator(chat, device) if chat.temperature > 0 else None
        self._likelihoods: torch.Tensor | None = None

    def choose(self, logits: torch.Tensor) -> None:
        """Leave only what may come next; of a sampled row only the token that it draws.

        Args:
            logits: (vocabulary,), as the model gives them; changed in place.

        Raises:
            GrammarFailedError: the grammar became too costly.
        """
        if self._chat.top_logprobs is not None or self._chat.escalation is not None:
            self._likelihoods = logits.float().log_softmax(-1)
        if self._chat.grammar is not None:
            logits[~self._chat.grammar.allowed(logits)] = -torch.inf
        if self._draws is not None:
            token = torch.multinomial(_probabilities(logits, self._chat), 1, generator=self._draws)
            logits.fill_(-torch.inf)
            logits[token] = 0.0

    def probability(self, token: int) -> float:
        """Of the token that was chosen, as the model gives it; where answers may be made again."""
        return 1.0 if self._likelihoods is None else float(self._likelihoods[token].exp())

    def take(self, token: int) -> tuple[Token, ...]:
        """Go on behind a token.

        Returns:
            How likely it was, and what else; empty where nobody asked.

        Raises:
            GrammarFailedError: it may not come.
        """
        if self._chat.grammar is not None:
            self._chat.grammar.take(token)
        if self._likelihoods is None or self._chat.top_logprobs is None:
            return ()
        found, ids = self._likelihoods.topk(min(self._chat.top_logprobs, len(self._likelihoods)))
        others = (self._likely(other, value) for other, value in zip(ids.tolist(), found.tolist(), strict=True))
        return (Token(self._likely(token, float(self._likelihoods[token])), tuple(others)),)

    def _likely(self, token: int, logprob: float) -> Likely:
        return Likely(self._texts.bytes_of(token), max(logprob, _LEAST))


class TokenTexts:
    """The bytes of tokens, each by itself.

    Args:
        tokenizer: of a processor.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = frozenset(tokenizer.get_added_vocab().values())
        self._by_bytes = isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)

    def bytes_of(self, token: int) -> bytes:
        """What the token stands for; of a part of a character, those of its bytes that it has."""
        if not self._by_bytes or token in self._added:
            return str(self._tokenizer.decode([token])).encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        return b"" if piece is None else bytes(_BYTES[character] for character in piece)


def _byte_characters() -> dict[str, int]:
    """How vocabularies of bytes write a byte: as its Latin-1 character where that can be seen, and others from U+0100
    on, in order. Of GPT-2.
    """
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(unseen)}


_BYTES = _byte_characters()


def _probabilities(logits: torch.Tensor, chat: Chat) -> torch.Tensor:
    """What is drawn from: the likeliest tokens whose sum reaches `top_p`, not normalised. (vocabulary,), float32."""
    probabilities = (logits.float() / chat.temperature).softmax(-1)
    if chat.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        probabilities[order[ordered.cumsum(-1) - ordered >= chat.top_p]] = 0.0
    return probabilities


def _generator(chat: Chat, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(secrets.randbits(63) if chat.seed is None else chat.seed)
