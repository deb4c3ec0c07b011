"""The page in a real browser: what people do on it, what they read, and what runs for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import expect

from crosstrim import mini
from crosstrim.asking import answering
from crosstrim.play.state import PER_CENTS, config_of

pytestmark = pytest.mark.play

SCREENSHOTS = Path(__file__).parents[2] / "build" / "play"
FIRST = mini.examples()[0]["questions"][-1]["question"]


def upload(page, path):
    """Give the page a picture, as its button does."""
    if page.get_by_label("Remove Image").count():
        page.get_by_label("Remove Image").click()
    page.locator("#picture input[type=file]").set_input_files(path)


def ask(page, question):
    page.get_by_label("Question", exact=True).fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()


def kept(page):
    """How many features were kept, and of how many."""
    number, of, visible = page.locator("#kept dd").evaluate("element => element.firstChild.data").split()
    assert of == "of"
    return int(number), int(visible)


def slide(page, *keys):
    """Move the budget by keys."""
    for key in keys:
        page.get_by_label("range slider for Budget").press(key)


def shoot(page, name):
    """A picture of the page for people to look at."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def test_it_opens_with_an_example_that_is_answered(page, served):
    expect(page).to_have_title("crosstrim playground")
    expect(page.get_by_label("Question", exact=True)).to_have_value(FIRST)
    subject = served.playground.open(mini.examples()[0]["image"])
    expected = answering.ask(
        served.playground._model,
        served.playground._processor,
        subject.picture,
        FIRST,
        config_of("keep", 5, None),
        compare=True,
        max_new_tokens=16,
    )
    expect(page.locator("#trimmed p")).to_have_text(expected.answer)
    expect(page.locator("#untrimmed p")).to_have_text(expected.untrimmed.answer)
    assert kept(page) == (expected.report.kept, expected.report.visible) == (13, 260)
    expect(page.locator("#kv dd")).to_contain_text("29.2 KiB")
    expect(page.locator("#kv small")).to_have_text("of 585 KiB untrimmed")
    expect(page.locator("#verdict dd")).to_contain_text("answer changed")
    page.wait_for_function("document.querySelector('#overlay img').naturalWidth == 720")
    shoot(page, "light")


def test_a_second_visit_runs_nothing_again(visit, served):
    visit()
    served.forget_counts()
    visit()
    assert (served.passes, served.generated) == ([], [])


def test_upload_ask_and_ask_again_with_the_tower_entered_once(page, served, photo):
    row = mini.heldout()[0]
    upload(page, photo)
    expect(page.locator("#result")).to_contain_text("and ask")
    ask(page, row["question"])
    expect(page.locator("#untrimmed p")).to_have_text(row["answers"][0])
    assert (served.passes, len(served.generated)) == ([1], 2)
    ask(page, "How many digits are there?")
    expect(page.locator("#untrimmed p")).not_to_have_text(row["answers"][0])
    assert (served.passes, len(served.generated)) == ([1], 4)


def test_the_slider_by_keys_and_by_pointer(page, served):
    slide(page, "ArrowRight", "ArrowRight")
    expect(page.locator("#kept small")).to_have_text("visible features, 7.3 %")
    assert kept(page) == (19, 260)
    expect(page.locator("#verdict dd")).to_contain_text("same answer")
    bar = page.get_by_label("range slider for Budget").bounding_box()
    page.mouse.move(bar["x"] + bar["width"] / 2, bar["y"] + bar["height"] / 2)
    page.mouse.down()
    page.mouse.move(bar["x"] + bar["width"] * 0.75, bar["y"] + bar["height"] / 2, steps=10)
    before = len(served.generated)
    page.mouse.move(bar["x"] + bar["width"] - 1, bar["y"] + bar["height"] / 2, steps=10)
    assert len(served.generated) == before  # nothing runs before it is let go of
    page.mouse.up()
    expect(page.locator("#kept small")).to_have_text("visible features, 100.0 %")
    assert len(served.generated) == before + 1


@pytest.mark.parametrize("remembered", [False, True])
def test_a_move_that_arrives_after_a_later_one_counts_for_nothing(page, remembered):
    held = []
    page.route("**/queue/join*", lambda route: route.continue_() if held else held.append(route))
    slide(page, "End")
    until(page, held)
    slide(page, "ArrowLeft")
    expect(page.locator("#kept small")).to_have_text("visible features, 99.2 %")
    with page.expect_response("**/queue/join*"):
        held[0].continue_()
    page.wait_for_timeout(1000)  # enough for an answer that should not come
    expect(page.locator("#kept small")).to_have_text("visible features, 99.2 %")
    page.unroute("**/queue/join*")
    slide(page, "End")  # which the second time is known
    expect(page.locator("#kept small")).to_have_text("visible features, 100.0 %")


def until(page, found):
    for _ in range(1000):
        if found:
            return
        page.wait_for_timeout(10)
    pytest.fail("the page sent nothing")


def test_moves_while_the_model_is_busy_leave_only_the_last_to_run(page, served):
    gate = threading.Event()
    served.playground._worker.submit(gate.wait)
    try:
        page.get_by_label("range slider for Budget").press("End")
        for budget in range(99, 94, -1):  # to 95, by five moves that are sent to the server
            slide(page, "ArrowLeft")
            expect(page.get_by_label("range slider for Budget")).to_have_value(str(budget))
        page.wait_for_timeout(500)
        assert served.generated == []
    finally:
        gate.set()
    expect(page.locator("#kept small")).to_have_text("visible features, 95.0 %")
    assert len(served.generated) == 1  # the untrimmed answer is known


def test_both_knobs_and_every_policy_can_be_chosen(page, served):
    page.get_by_label("k: each attention head").check()
    expect(page.locator("#verdict small")).to_have_text("policy union")
    assert kept(page)[0] > 13
    page.get_by_label("Who chooses them").click()
    page.get_by_role("option", name="grid").click()
    expect(page.locator("#verdict small")).to_have_text("policy grid")
    assert len(served.generated) == 2


def test_heat_comes_on_request(page, served):
    expect(page.locator("#heat img")).to_have_count(0)
    page.get_by_label("Show the saliency").check()
    page.wait_for_function("document.querySelector('#heat img')?.naturalWidth == 720")
    assert served.generated == [1]
    shoot(page, "heat")
    page.get_by_label("Show the saliency").uncheck()
    expect(page.locator("#heat img")).to_have_count(0)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("broken.png", b"\x89PNG\r\n\x1a\n" + b"nothing" * 9, "Broken.png is"),
        ("notes.jpg", b"no picture at all", "Notes.jpg is no picture that crosstrim reads"),
    ],
)
def test_a_broken_file_is_a_sentence_and_the_page_goes_on(page, served, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    upload(page, tmp_path / name)
    expect(page.get_by_role("alert")).to_contain_text(words)
    said = page.get_by_role("alert").inner_text()
    assert "Traceback" not in said
    assert "/" not in said
    ask(page, FIRST)
    expect(page.get_by_role("alert")).to_contain_text("There is no picture yet")
    page.get_by_role("button", name="Example: rocket").click()
    expect(page.locator("#untrimmed p")).to_have_text("4 8 2 3 9")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_question_that_cannot_be_asked_is_a_sentence(page, served):
    ask(page, " ")
    expect(page.get_by_role("alert")).to_have_text("The question is empty; ask something about the picture.")
    ask(page, "why " * 900)
    expect(page.get_by_role("alert")).to_contain_text("together the model reads")
    expect(page.locator("#trimmed")).to_have_count(0)
    assert served.generated == []


def test_a_failure_that_nobody_worded_shows_no_trace(page, served, monkeypatch, capfd):
    monkeypatch.setattr(served.playground._model, "generate", lambda **_: 1 / 0)
    slide(page, "ArrowLeft")
    expect(page.get_by_role("alert")).to_contain_text("Something went wrong; the terminal")
    assert "ZeroDivision" not in page.content()
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_file_beyond_the_limit_is_refused(page, visit, tmp_path):
    (tmp_path / "large.png").write_bytes(b"\0" * (1 << 20 | 1))
    upload(page, tmp_path / "large.png")
    expect(page.get_by_test_id("toast-body")).to_contain_text("exceed the maximum allowed size of 1.0 Mb")
    visit.failed.clear()  # the browser tells of the refusal as well


def test_all_budgets_in_a_table_and_a_plot(page, served):
    page.get_by_role("tab", name="All budgets").click()
    page.get_by_role("button", name="Ask at every budget").click()
    rows = page.locator("#table tbody tr")
    expect(rows).to_have_count(len(PER_CENTS))
    assert rows.locator("th").all_inner_texts() == [f"{per_cent} %" for per_cent in PER_CENTS]
    counts = list(map(int, rows.locator("td:nth-child(2)").all_inner_texts()))
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (3, 260)
    verdicts = rows.locator("td:last-child").all_inner_texts()
    assert verdicts[-1] == "same"
    assert "changed" in verdicts
    expect(page.locator("#plot .vega-embed")).to_be_visible()
    # What was asked at single budgets before does not run again.
    assert len(served.generated) <= len(PER_CENTS)
    before = len(served.generated)
    page.get_by_role("button", name="Ask at every budget").click()
    page.get_by_role("tab", name="Compare").click()
    slide(page, "Home")
    expect(page.locator("#kept small")).to_have_text("visible features, 1.2 %")
    assert len(served.generated) == before


def test_a_chat_keeps_the_picture(page, served):
    page.get_by_role("tab", name="Chat").click()
    for turn, (message, answer) in enumerate([("What colour is the 2?", "orange"), ("Where is it?", "")], 1):
        page.get_by_role("textbox", name="Message").fill(message)
        page.get_by_role("textbox", name="Message").press("Enter")
        # Not the last one: while the page waits, the last is now a bubble with dots and now the answer before.
        reply = page.locator("#chat .bot.message").nth(turn - 1)
        expect(reply).to_contain_text(answer)
        expect(reply).to_contain_text("kept 13 of 260 features, 5.0 %")
        expect(page.locator("#chat .bot.message")).to_have_count(turn)
    assert (served.passes, len(served.generated)) == ([], 2)
    shoot(page, "chat")
    page.get_by_role("button", name="Begin anew").click()
    expect(page.locator("#chat .message")).to_have_count(0)
    page.get_by_role("textbox", name="Message").fill("x" * 3000)
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("alert")).to_contain_text("together the model reads")


def test_it_fits_on_a_phone(visit):
    page = visit(viewport={"width": 375, "height": 700}, has_touch=True, is_mobile=True)
    page.get_by_role("button", name="Ask", exact=True).tap()
    page.wait_for_function("document.querySelector('#result').getBoundingClientRect().top < innerHeight")
    page.get_by_label("Show the saliency").check()
    page.wait_for_function("document.querySelector('#heat img')?.naturalWidth > 0")
    widths = [page.evaluate("document.documentElement.scrollWidth")]
    shoot(page, "phone")
    for tab in ("All budgets", "Chat"):
        page.get_by_role("tab", name=tab).click()
        if tab == "All budgets":
            page.get_by_role("button", name="Ask at every budget").click()
            expect(page.locator("#plot .vega-embed")).to_be_visible()
            shoot(page, "phone-budgets")
        widths.append(page.evaluate("document.documentElement.scrollWidth"))
    assert widths == [375] * 3


def test_it_is_dark_where_the_browser_is(visit):
    brightness = """name => {
        const [property, selector] = name.split(" ");
        const canvas = new OffscreenCanvas(1, 1).getContext("2d");
        canvas.fillStyle = getComputedStyle(document.querySelector(selector))[property];
        canvas.fillRect(0, 0, 1, 1);
        const [red, green, blue] = canvas.getImageData(0, 0, 1, 1).data;
        return (red + green + blue) / 765;
    }"""
    for scheme, is_dark in (("dark", True), ("light", False)):
        page = visit(color_scheme=scheme)
        seen = [page.evaluate(brightness, f"backgroundColor {one}") for one in ("body", ".answer")]
        written = [page.evaluate(brightness, f"color {one}") for one in (".answer p", "#kept dd", "#heading h1")]
        assert all((one < 0.25) == is_dark for one in seen), seen
        assert all((one > 0.75) == is_dark for one in written), written
        if is_dark:
            shoot(page, "dark")


def test_everything_is_reached_by_the_keyboard(page):
    reached, wanted = set(), {"Ask", "Question", "range slider for Budget in per cent", "Example: cat", "Compare"}
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("""() => {
                const at = document.activeElement;
                const image = at.querySelector?.("img");
                const label = at.closest?.("label")?.querySelector("[data-testid=block-info]");
                return at.ariaLabel || image?.alt || label?.innerText.trim() || at.innerText?.trim() || "";
            }""")
        )
    assert wanted <= reached, wanted - reached
    page.get_by_label("Question", exact=True).focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("What colour is the 2?")
    page.keyboard.press("Enter")
    expect(page.locator("#untrimmed p")).to_have_text("orange")


def test_the_command_tells_its_address_and_ends_when_told():
    program = Path(sys.executable).with_name("crosstrim")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [program, "play", "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        # A shell lets what it starts in the background ignore the signal, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        line = json.loads(process.stdout.readline())
        assert line["model"] == "mini"
        assert line["url"].startswith("http://127.0.0.1:")
        with urllib.request.urlopen(line["url"], timeout=60) as response:
            assert "default-src 'self'" in response.headers["content-security-policy"]
        process.send_signal(signal.SIGINT)
        out, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in told


def test_pictures_that_the_browser_cannot_draw_are_shown_all_the_same(page, tmp_path):
    Image.new("RGB", (64, 48), "teal").save(tmp_path / "scan.tiff")
    upload(page, tmp_path / "scan.tiff")
    page.wait_for_function("document.querySelector('#picture img')?.naturalWidth == 64")
