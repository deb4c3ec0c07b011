"""Every word that a page can hold: closed lists, so that a small tokenizer has a token for each."""

from __future__ import annotations


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _split(
    "Anna Ben Clara David Emma Frank Grace Henry Iris Jack Kate Leo "
    "Maria Nina Oscar Paul Rosa Sam Tina Tom Victor Wendy Yara Zoe"
)
CITIES = _split(
    "Athens Austin Berlin Boston Cairo Dallas Delhi Denver Dublin Geneva Kyoto Lima "
    "Lisbon Madrid Miami Milan Oslo Paris Prague Quito Rome Tokyo Turin Vienna"
)
ITEMS = _split(
    "Apple Beans Bread Butter Cake Chair Cheese Coffee Corn Cup Egg Fish Garlic Ham Honey Jam Juice Knife Lamp Lemon "
    "Milk Nuts Onion Paper Pasta Pear Pen Pepper Pie Pizza Plum Rice Salad Salt Soap Soup Spoon Sugar Tea Water"
)
MONTHS = _split("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec")
SHOPS = _split("Bridge Castle Corner Forest Garden Harbor Island Market Ocean River Station Village")
SHOP_KINDS = _split("Bakery Cafe Shop Store")
FIELDS = _split("Name City Date Room Seat Guest")
LABELS = _split("Total Cash Item Qty Price")
LETTER = _split("Dear Send to by Yours Thank you")
NUMBERS = (*(str(number) for number in range(100)), *(f"{number:02d}" for number in range(10)))

LETTERED = (*NAMES, *CITIES, *ITEMS, *MONTHS, *SHOPS, *SHOP_KINDS, *FIELDS, *LABELS, *LETTER)
WORDS = (*LETTERED, *NUMBERS)
INDEX = {word: place for place, word in enumerate(LETTERED)}
"""What patches call the words that are not numbers; a number is called by its digits."""
