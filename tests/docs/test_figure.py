from __future__ import annotations

import re

import crosstrim
from crosstrim.asking import answering, images
from tests.support.docs import pages


def test_the_caption_of_the_playground_is_true():
    readme = " ".join(pages.text("README.md").split())
    caption = r'\*Of the (\d+) features, (\d+) stay \(`keep=0.1`\), and "([^"]+)" is answered as untrimmed'
    visible, kept, question = re.search(caption, readme).groups()
    picture = images.open_image(images.find("cat"))
    session = crosstrim.Session(*crosstrim.load("mini"), picture, keep=0.1)
    answer = session.ask(question)
    assert (answer.report.visible, answer.report.kept) == (int(visible), int(kept))
    assert answer.answer == session.ask_untrimmed(question).answer


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
