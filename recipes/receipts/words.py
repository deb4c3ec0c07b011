"""Every word that a page can hold: closed lists, so that a small tokenizer has a token for each."""

from __future__ import annotations


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _split("Anna Ben Clara David Emma Frank Grace Henry Iris Jack")
CITIES = _split("Athens Boston Cairo Delhi Geneva Lima Madrid Oslo Paris Tokyo")
ITEMS = _split("Apple Bread Cake Cheese Coffee Fish Honey Jam Lemon Milk Pasta Pizza Rice Soap Tea Water")
MONTHS = _split("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec")
SHOPS = _split("Bridge Castle Forest Garden Market River")
SHOP_KINDS = _split("Bakery Cafe Shop Store")
FIELDS = _split("Name City Date Room Seat Guest")
LABELS = _split("Total Cash Item Qty Price")
LETTER = _split("Dear Send to by Yours Thank you")
NUMBERS = tuple(str(number) for number in range(100))

LETTERED = (*NAMES, *CITIES, *ITEMS, *MONTHS, *SHOPS, *SHOP_KINDS, *FIELDS, *LABELS, *LETTER)
WORDS = (*LETTERED, *NUMBERS)
INDEX = {word: place for place, word in enumerate(WORDS)}
"""The class of each word on a patch."""
