"""The page, laid out with Gradio; what it shows comes from `state`, and what it says from `words`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from crosstrim import mini
from crosstrim.errors import InputError
from crosstrim.play import words
from crosstrim.play.state import KNOBS, PER_CENTS, Comparison, Playground, Point, Subject, config_of
from crosstrim.play.visitor import SupersededError, Visitors

FIRST_PER_CENT = 5
"""The budget when the page opens."""

_SENT = "(...given) => [...given.slice(0, -1), performance.now()]"
"""Puts the page's clock in the place of the last input."""

# Every event goes to the server at once, where it supersedes what was wished for before.
_AT_ONCE: dict[str, Any] = {"trigger_mode": "multiple", "concurrency_limit": None, "api_visibility": "private"}
_COLOURS = {words.SAME: "#0d9488", words.CHANGED: "#ea580c"}


class Page:
    """The blocks of one page, and what happens on them.

    Args:
        playground: what answers.
        model: what the model is called.

    Attributes:
        blocks: for `gradio.mount_gradio_app`.
    """

    def __init__(self, playground: Playground, model: str) -> None:
        self._playground = playground
        self._visitors = Visitors()
        self._examples = mini.examples()
        with gr.Blocks(
            title="crosstrim playground", analytics_enabled=False, delete_cache=(3600, 3600)
        ) as self.blocks:
            _html("heading", words.heading(model))
            self._notice = _html("notice")
            with gr.Row():
                with gr.Column(scale=4, min_width=300):
                    self._lay_out_controls()
                with gr.Column(scale=6, min_width=300), gr.Tabs():
                    with gr.Tab("Compare"):
                        self._lay_out_comparison()
                    with gr.Tab("All budgets"):
                        self._lay_out_range()
                    with gr.Tab("Chat"):
                        self._lay_out_chat()
            self._connect()
        self.blocks.queue(max_size=256)

    def _lay_out_controls(self) -> None:
        self._picture = gr.Image(
            label="Picture", elem_id="picture", sources=["upload", "clipboard"], height=280, buttons=["fullscreen"]
        )
        self._example = gr.State(0)
        self._sent = gr.Number(visible=False)  # when an event was sent, by the page's clock
        self._pictures = gr.Dataset(
            label="Examples",
            elem_id="examples",
            components=["image"],
            samples=[[example["image"]] for example in self._examples],
            type="index",
        )
        self._question = gr.Textbox(
            label="Question", elem_id="question", placeholder="Ask something about the picture", max_length=4000
        )
        self._suggestions = gr.Dataset(
            label="Questions to this picture",
            elem_id="suggestions",
            components=["textbox"],
            samples=self._asked_of(0),
            type="index",
        )
        self._ask = gr.Button("Ask", variant="primary", elem_id="ask")
        self._per_cent = gr.Slider(
            1, 100, FIRST_PER_CENT, step=1, label="Budget in per cent", elem_id="budget", buttons=[]
        )
        self._knob = gr.Radio(words.KNOB_CHOICES, value=KNOBS[0], label="The budget means", elem_id="knob")
        self._policy = gr.Dropdown(
            words.POLICY_CHOICES, value="", label="Who chooses them (policy)", elem_id="policy"
        )

    def _lay_out_comparison(self) -> None:
        self._result = _html("result", words.WAITING)
        self._wants_heat = gr.Checkbox(
            label="Show the saliency: what the question looks at in the first cross-attention layer",
            elem_id="wants-heat",
        )
        picture: dict[str, Any] = {"interactive": False, "height": 400, "buttons": ["download", "fullscreen"]}
        with gr.Row():
            self._overlay = gr.Image(label="What was kept", elem_id="overlay", min_width=260, **picture)
            self._heat = gr.Image(
                label="Saliency",
                elem_id="heat",
                min_width=260,
                visible=False,
                **picture,
            )

    def _lay_out_range(self) -> None:
        gr.Markdown(
            f"Your question at {len(PER_CENTS)} budgets, from {PER_CENTS[0]} to {PER_CENTS[-1]} per cent. Where does "
            "the answer change?"
        )
        self._draw = gr.Button("Ask at every budget", variant="primary", elem_id="draw")
        self._plot = gr.BarPlot(
            x="budget, %",
            y="kept, %",
            color="verdict",
            color_map=_COLOURS,
            sort=list(map(str, PER_CENTS)),
            y_lim=[0, 100],
            tooltip="all",
            height=280,
            elem_id="plot",
            visible=False,
        )
        self._table = _html("table")

    def _lay_out_chat(self) -> None:
        gr.Markdown("A conversation about the picture. Each turn is trimmed anew, at the budget that is set by then.")
        self._said = gr.State([])
        self._chatbot = gr.Chatbot(
            elem_id="chat", show_label=False, height=380, render_markdown=False, buttons=[], feedback_options=None
        )
        with gr.Row():
            self._message = gr.Textbox(
                show_label=False,
                label="Message",
                placeholder="Say something",
                elem_id="message",
                scale=8,
                max_length=4000,
            )
            self._send = gr.Button("Send", variant="primary", elem_id="send", scale=1, min_width=90)
        self._anew = gr.Button("Begin anew", elem_id="anew")

    def _connect(self) -> None:
        """Which event does what. Every handler's first output is the notice."""
        results = [self._notice, self._result, self._overlay, self._heat]
        shown = [*results, self._picture, self._plot, self._table, self._chatbot, self._said]
        knobs = [self._knob, self._per_cent, self._policy]
        answer = {
            "fn": _worded(self._answer, self._nothing(None)[:3]),
            "inputs": [self._question, *knobs, self._wants_heat, self._sent],
            "outputs": results,
            "js": _SENT,
            "show_progress": "minimal",
            **_AT_ONCE,
        }
        asking = [self._ask.click, self._question.submit, self._per_cent.release, self._knob.input]
        gr.on([*asking, self._policy.input, self._wants_heat.input], **answer)
        # Not preprocessed: crosstrim opens the file, under its own limits, and not Gradio.
        upload = _worded(self._upload, self._nothing(None))
        self._picture.upload(upload, [self._picture], shown, preprocess=False, **_AT_ONCE)
        self._picture.clear(_worded(self._clear, ()), None, shown, **_AT_ONCE)

        chosen = [*shown, self._example, self._question, self._suggestions]
        for choosing, inputs in ((self._pictures.click, [self._pictures]), (self.blocks.load, [self._example])):
            choosing(_worded(self._choose, ()), inputs, chosen, **_AT_ONCE).success(**answer)
        suggested = [self._suggestions, self._example]
        self._suggestions.click(self._suggest, suggested, [self._question], **_AT_ONCE).success(**answer)

        ranged = [self._notice, self._plot, self._table]
        draw = _worded_steps(self._range, (gr.skip(), gr.skip()))
        wanted = [self._question, self._knob, self._policy]
        self._draw.click(draw, wanted, ranged, show_progress="minimal", **_AT_ONCE)
        talk = [self._notice, self._chatbot, self._said, self._message]
        turn = _worded_steps(self._talk, (gr.skip(), gr.skip(), gr.skip()))
        once = {**_AT_ONCE, "trigger_mode": "once"}
        gr.on([self._send.click, self._message.submit], turn, [self._message, *knobs, self._said], talk, **once)
        gr.on(
            [self._anew.click, self._chatbot.clear], _worded(self._begin_anew, ([], [])), None, talk[:3], **_AT_ONCE
        )
        self.blocks.unload(self._leave)

    def _answer(
        self,
        request: gr.Request,
        question: str,
        knob: str,
        per_cent: float,
        policy: str,
        wants_heat: bool,
        sent: float,
    ) -> tuple[Any, ...]:
        visitor = self._visitors.of(request.session_hash)
        subject, config = visitor.subject, config_of(knob, per_cent, policy or None)
        wish = visitor.wish("answer", (question, config, wants_heat), sent)
        found = self._playground.compare(subject, question, config, wish)
        warm = self._playground.heat(subject, question, wish) if wants_heat else None
        said = words.comparison(found, self._playground.legend(subject, found))
        painted = self._playground.overlay(subject, found)
        if wish.is_superseded():  # what is remembered does not run, and so nothing stopped it
            raise SupersededError
        return said, painted, gr.update(value=warm, visible=wants_heat)

    def _upload(self, request: gr.Request, uploaded: dict[str, Any]) -> tuple[Any, ...]:
        self._clear(request)  # also where the new one is refused
        path = Path(uploaded["path"]).resolve()
        if not path.is_relative_to(Path(self._picture.GRADIO_CACHE).resolve()):
            raise InputError("this picture was not uploaded here; drop it once more.")
        return self._open(request, path)

    def _open(self, request: gr.Request, path: Path) -> tuple[Any, ...]:
        subject = self._playground.open(path)
        self._visitors.of(request.session_hash).show(subject)
        return self._nothing(subject)

    def _clear(self, request: gr.Request) -> tuple[Any, ...]:
        self._visitors.of(request.session_hash).show(None)
        return self._nothing(None)

    def _choose(self, request: gr.Request, number: int) -> tuple[Any, ...]:
        shown = self._open(request, Path(self._examples[number]["image"]))
        questions = self._asked_of(number)
        return *shown, number, questions[-1][0], gr.update(samples=questions)

    def _suggest(self, number: int, example: int) -> str:
        return self._asked_of(example)[number][0]

    def _range(self, request: gr.Request, question: str, knob: str, policy: str) -> Iterator[tuple[Any, ...]]:
        visitor = self._visitors.of(request.session_hash)
        subject, wish = visitor.subject, visitor.wish("range", (question, knob, policy))
        for points in self._playground.sweep(subject, question, knob, policy or None, wish):
            # Gradio draws asynchronously and may end with an older figure: it gets the last one alone.
            is_whole = len(points) == len(PER_CENTS)
            plot = gr.update(value=_frame(points), visible=True) if is_whole else gr.update(visible=False)
            yield plot, words.table(points)

    def _talk(
        self, request: gr.Request, message: str, knob: str, per_cent: float, policy: str, said: list[Any]
    ) -> Iterator[tuple[Any, ...]]:
        visitor = self._visitors.of(request.session_hash)
        subject, config = visitor.subject, config_of(knob, per_cent, policy or None)
        wish = visitor.wish("chat")
        asked = [*said, {"role": "user", "content": message}]
        yield asked, said, ""
        answer = self._playground.chat(subject, message, config, wish)
        replies = [{"role": "assistant", "content": one} for one in (answer.answer, words.turn(answer))]
        yield [*asked, *replies], [*asked, *replies], ""

    def _begin_anew(self, request: gr.Request) -> tuple[Any, ...]:
        visitor = self._visitors.of(request.session_hash)
        visitor.wish("chat").supersede()
        self._playground.forget(visitor.subject)
        return [], []

    def _leave(self, request: gr.Request) -> None:
        self._visitors.forget(request.session_hash)

    def _nothing(self, subject: Subject | None) -> tuple[Any, ...]:
        """What is shown of a picture that nothing was asked about yet."""
        shown = None if subject is None else subject.shown()
        return words.WAITING, None, None, shown, gr.update(visible=False), "", [], []

    def _asked_of(self, number: int) -> list[list[str]]:
        return [[asked["question"]] for asked in self._examples[number]["questions"]]


def _html(name: str, content: str = "") -> gr.HTML:
    return gr.HTML(content, elem_id=name, apply_default_css=False, padding=True)


def _frame(points: tuple[Point, ...]) -> pd.DataFrame:
    def row(per_cent: int, found: Comparison) -> dict[str, Any]:
        kept = round(100 * found.report.kept_fraction, 1)
        verdict = words.SAME if found.same else words.CHANGED
        return {"budget, %": str(per_cent), "kept, %": kept, "answer": found.trimmed.answer, "verdict": verdict}

    return pd.DataFrame([row(point.per_cent, point.comparison) for point in points])


def _worded(handler: Callable[..., tuple[Any, ...]], otherwise: tuple[Any, ...]) -> Callable[..., Any]:
    """The handler, before whose outputs comes the notice: no words, or an error's, and then `otherwise`."""

    @functools.wraps(handler)
    def run(*arguments: Any) -> Any:
        try:
            return "", *handler(*arguments)
        except SupersededError:
            return gr.skip()
        except Exception as error:  # whatever it is, the page says it in a sentence
            return words.notice(words.sentence(error)), *otherwise

    return run


def _worded_steps(
    handler: Callable[..., Iterator[tuple[Any, ...]]], otherwise: tuple[Any, ...]
) -> Callable[..., Iterator[Any]]:
    """As `_worded`, for a handler that shows something several times."""

    @functools.wraps(handler)
    def run(*arguments: Any) -> Iterator[Any]:
        try:
            for shown in handler(*arguments):
                yield "", *shown
        except SupersededError:
            yield gr.skip()
        except Exception as error:  # as above
            yield words.notice(words.sentence(error)), *otherwise

    return run
