from __future__ import annotations

import re

import crosstrim
from crosstrim.asking import answering, images
from tests.support.docs import pages


def test_the_caption_of_the_figure_is_true():
    readme = " ".join(pages.text("README.md").split())
    question = re.search(r'\*"([^"]+)" asked of the embedded model with `k=0.05`', readme)[1]
    kept, features = map(int, re.search(r"kept (\d+) of the picture's (\d+) features", readme).groups())
    model, processor = crosstrim.load("mini")
    picture = images.open_image(images.find("cat"))
    answer = answering.ask(model, processor, picture, question, crosstrim.TrimConfig(k=0.05), compare=True)
    assert f'answers "{answer.answer}"' in readme
    assert answer.untrimmed.answer == answer.answer
    assert answer.report.visible == features
    assert abs(answer.report.kept - kept) <= 3  # another processor rounds otherwise
