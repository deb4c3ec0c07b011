"""The Space's files, against what they name."""

from __future__ import annotations

import inspect
import re
import runpy

import yaml

from crosstrim.play import serving
from tests.support.docs import pages

SPACE = pages.ROOT / "space"


def front_matter():
    return yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def test_the_space_serves_where_a_space_is_looked_for(monkeypatch):
    served = []
    monkeypatch.setattr(serving, "serve", lambda *args, **options: served.append((args, options)))
    monkeypatch.setenv("CROSSTRIM_MODEL", "some/model")
    app = SPACE / front_matter()["app_file"]
    runpy.run_path(str(app))
    assert served == []  # importing it starts nothing
    runpy.run_path(str(app), run_name="__main__")
    ((arguments, options),) = served
    assert (arguments, options["host"], options["port"]) == (("some/model",), "0.0.0.0", 7860)
    inspect.signature(serving.serve).bind(*arguments, **options)


def test_the_space_takes_the_gradio_that_is_tested():
    matter = front_matter()
    tested = re.search(r"^gradio==(.+)$", (pages.ROOT / "constraints-play.txt").read_text(encoding="utf-8"), re.M)
    assert (matter["sdk"], matter["sdk_version"]) == ("gradio", tested[1])
    assert "crosstrim[play]" in (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
