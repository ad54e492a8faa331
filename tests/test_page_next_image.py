"""Marks and questions while the next image is on its way: each stays with the image it was given for."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

from keys_and_ports import no_keys  # noqa: F401 - a fixture
from page_serving import (
    ANSWERS,
    SURE,
    answered,
    dialogues,
    give,
    png,
    script,
    system_chromium,  # noqa: F401 - a fixture
    told,
    with_answers,
)


class Held:
    """Uploads of a running page wait until they are let go."""

    def __init__(self, running):
        self.go, self.add, running.page.shelf.add = threading.Event(), running.page.shelf.add, self

    async def __call__(self, data: bytes):
        assert await asyncio.to_thread(self.go.wait, 120)
        return await self.add(data)


@contextlib.contextmanager
def next_one_sent(tmp_path, chromium, answer=script):
    """A tab with the eight answers of scan.png, its page, and what lets second.png go, which is on its way."""
    with with_answers(tmp_path, chromium, answer) as (tab, running):
        held = Held(running)
        give(tab, png(seed=1), "second.png")
        tab.wait_for_selector("#drop[data-state=sending]")
        yield tab, running, held.go


def test_a_mark_made_while_the_next_image_is_sent_is_not_lost_without_a_word(tmp_path, chromium):
    with next_one_sent(tmp_path, chromium) as (tab, running, go):
        tab.click("#Q5 .wrong")
        tab.fill("#Q5 input", "13-15 weeks")
        asked = dialogues(tab, accept=False)
        go.set()
        tab.wait_for_selector("#drop:not([data-state])")
        assert asked == ["1 mark on this image is not saved. Go on without it?"]
        assert tab.locator("#Q5 input").input_value() == "13-15 weeks"
        tab.locator("#caption").get_by_text("scan.png").wait_for()
        tab.click("#save")
        tab.locator("#marked").get_by_text("Saved: 1 mark").wait_for()
        give(tab, png(seed=1), "second.png")
        tab.locator("#caption").get_by_text("second.png").wait_for()
        assert answered(tab) == ANSWERS and len(asked) == 1


def test_marks_that_were_given_up_are_asked_about_once(tmp_path, chromium):
    with with_answers(tmp_path, chromium) as (tab, running):
        tab.click("#Q1 .right")
        asked = dialogues(tab, accept=True)
        give(tab, png(seed=1), "second.png")
        tab.locator("#caption").get_by_text("second.png").wait_for()
        assert answered(tab) == ANSWERS and len(asked) == 1


def test_marks_saved_while_the_next_image_is_sent_stay_with_theirs(tmp_path, chromium):
    """Even where the page no longer holds the image that they are on, as after a restart, and has to be sent it again."""
    with next_one_sent(tmp_path, chromium) as (tab, running, go):
        running.page.shelf.held.clear()
        tab.click("#Q5 .right")
        tab.click("#save")
        dialogues(tab, accept=True)
        go.set()
        tab.locator("#caption").get_by_text("second.png").wait_for()
        answered(tab)
        waited = time.monotonic()
        while not (kept := list(tmp_path.rglob("*.png"))) and time.monotonic() - waited < 120:
            time.sleep(0.05)
    assert [path.read_bytes() for path in kept] == [png()]


def test_what_is_asked_while_the_next_image_is_sent_stays_out_of_its_answers(tmp_path, chromium):
    second = threading.Event()

    def slowly(prompt: str, attempt: int):
        first = "plane" in prompt.lower() and second.is_set() and not slowly.done
        slowly.done = slowly.done or first
        return told("of the first image " * 200, SURE, pause=0.05) if first else script(prompt, attempt)

    slowly.done = False
    with next_one_sent(tmp_path, chromium, slowly) as (tab, running, go):
        second.set()
        tab.click("#Q3 .again")
        tab.locator("#Q3 .text").get_by_text("of the first").wait_for()
        go.set()
        tab.locator("#caption").get_by_text("second.png").wait_for()
        tab.wait_for_selector("#Q8[data-state=unsure]")
        assert answered(tab) == ANSWERS
        assert all(tab.locator(f"#{question_id} .right").is_visible() for question_id in ANSWERS)


def test_answers_can_be_marked_though_all_were_asked_again_while_their_image_was_sent(tmp_path, chromium):
    """The asking that is stopped ends after the new image's began: it must leave the cards to that."""

    def slowly(prompt: str, attempt: int):
        return told("of the first image " * 200, SURE, pause=0.05) if attempt == 2 else script(prompt, attempt)

    with next_one_sent(tmp_path, chromium, slowly) as (tab, running, go):
        tab.click("#all")
        tab.locator("#Q8 .text").get_by_text("of the first").wait_for()
        go.set()
        tab.locator("#caption").get_by_text("second.png").wait_for()
        tab.wait_for_selector("#Q8[data-state=unsure]")
        assert answered(tab) == ANSWERS and tab.locator(".problem:visible").count() == 0
        assert all(tab.locator(f"#{question_id} .{name}").is_visible() for question_id in ANSWERS for name in ("right", "wrong"))
        tab.click("#Q3 .right")
        assert tab.locator("#save").is_enabled()
