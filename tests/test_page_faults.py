"""What the person in front of the page sees when something fails: every fault in a real browser, and what goes on after it."""

from __future__ import annotations

import threading
import time

import pytest
import stand_in
from keys_and_ports import free_port, no_keys  # noqa: F401 - a fixture
from page_serving import (
    ANSWERS,
    PROMPTS,
    SURE,
    Running,
    answered,
    bomb,
    full_disk,
    give,
    opened,
    png,
    script,
    system_chromium,  # noqa: F401 - a fixture
    told,
    used,
)

from sonovqa import page, page_guard


def seen(tab, text: str) -> None:
    """Wait until the banner says so; a screen reader is told as well (role alert)."""
    tab.locator("#banner[role=alert]").get_by_text(text).wait_for()


def test_a_server_killed_in_mid_stream_is_waited_for_and_asked_again(tmp_path, chromium):
    """It dies while eight answers stream, is gone for a while, comes back on its port; nobody need do anything."""
    port, died = free_port(), threading.Event()

    def dying(prompt: str, attempt: int):
        def answer(handler):
            told(ANSWERS[PROMPTS[prompt]] + " and more", SURE, pieces=1)(handler)
            died.set()

        return answer

    with Running(f"http://127.0.0.1:{port}/v1", tmp_path, "--no-labels") as running:
        running.page.endpoint.backoff, running.page.endpoint.retries = 0.6, 6
        with opened(chromium, running.url) as tab:
            with stand_in.StandIn(dying, port=port):
                give(tab)
                assert died.wait(120)
            tab.locator("#Q1 .problem").get_by_text("cannot be reached, or broke off. Asking again").wait_for()
            assert tab.locator("#Q1 .text").inner_text().strip() == ""  # nothing half-said stays
            with stand_in.StandIn(script, port=port):
                assert answered(tab) == ANSWERS
            assert tab.locator(".problem:visible").count() == 0 and tab.locator("#banner").is_hidden()


def test_a_server_that_stays_away_is_told_and_asked_again_by_hand(tmp_path, chromium):
    port = free_port()
    with Running(f"http://127.0.0.1:{port}/v1", tmp_path, "--no-labels") as running:
        running.page.endpoint.retries = 1
        with opened(chromium, running.url) as tab:
            seen(tab, "no answer from the endpoint")
            give(tab)
            tab.locator("#Q3[data-state=error] .problem").get_by_text("cannot be used").wait_for()
            with stand_in.StandIn(script, port=port):
                tab.wait_for_selector("#model[data-state=well]")  # the page looks again by itself
                tab.wait_for_selector("#banner", state="hidden")
                tab.locator("#Q3 .again").click()
                tab.wait_for_selector("#Q3[data-state=done]")
                tab.click("#all")
                assert answered(tab) == ANSWERS


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "The file is empty"), (b"%PDF-1.7", "not an image that can be read"), (bomb(), "larger than 64 megapixels"),
        (None, "too large: 50 MB, at most 20 MB"),
    ],
    ids=["empty", "no image", "bomb", "50 MB"],
)  # fmt: skip
def test_files_that_cannot_be_used_are_told_and_the_last_image_stays(tmp_path, chromium, data, words):
    with used(chromium, tmp_path, script, "--no-labels") as (tab, running, behind):
        give(tab)
        answered(tab)
        if data is None:
            with open(tmp_path / "other.png", "wb") as stream:
                stream.truncate(50_000_000)
            tab.set_input_files("#file", tmp_path / "other.png")
        else:
            give(tab, data, "other.png")
        seen(tab, words)
        assert tab.locator("#caption").inner_text().startswith("scan.png")
        tab.fill("#question", "Is this ? the first image")
        tab.press("#question", "Enter")
        tab.locator(".said").get_by_text("you asked: Is this ? the first image").wait_for()


def test_an_address_is_not_fetched(tmp_path, chromium):
    drop = """() => {
      const data = new DataTransfer();
      data.setData("text/uri-list", "https://example.org/scan.png");
      document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
    }"""
    with used(chromium, tmp_path) as (tab, running, behind):
        tab.wait_for_selector("#Q8")
        tab.evaluate(drop)
        seen(tab, "the page fetches no address")
        assert not behind.bodies


def test_a_wrong_key_of_the_models_server_is_told(tmp_path, chromium, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "not-the-key")
    with used(chromium, tmp_path, script, key="the-key") as (tab, running, behind):
        seen(tab, "the endpoint refuses the key")
        running.page.endpoint.model = "run"  # the key was changed while the page ran
        give(tab)
        tab.locator("#Q1 .problem").get_by_text("refuses this page's key").wait_for()
        assert "not-the-key" not in tab.content()


def test_a_wrong_key_of_the_page_is_told_and_the_right_one_lets_in(tmp_path, chromium, monkeypatch):
    monkeypatch.setenv(page.KEY_NAME, "a-key-of-the-page-test")
    with used(chromium, tmp_path, script, "--no-labels") as (tab, running, behind):
        tab.keyboard.type("wrong")  # the field has the focus
        tab.keyboard.press("Enter")
        tab.locator("#wrong").get_by_text("not the page's key").wait_for()
        tab.keyboard.type("a-key-of-the-page-test")  # what was wrong is selected
        tab.keyboard.press("Enter")
        give(tab)
        assert answered(tab) == ANSWERS


def test_a_busy_page_says_so_keeps_the_place_and_answers_in_the_end(tmp_path, chromium):
    with used(chromium, tmp_path, script, "--no-labels", "--at-once", "1") as (tab, running, behind), running.page.answering():
        give(tab)
        tab.locator("#live").get_by_text("The page is busy").wait_for(state="attached")
        running.page.answering.most = 2
        assert answered(tab) == ANSWERS


def test_a_slow_upload_is_stopped_and_told(tmp_path, chromium, monkeypatch):
    monkeypatch.setattr(page_guard, "BODY_SECONDS", 0)  # not half a second: a busy Chromium may slow down after the upload only
    monkeypatch.setattr(page_guard, "PARTING_SECONDS", 300)  # Chromium reads the answer once it has sent everything
    with used(chromium, tmp_path) as (tab, running, behind):
        line = tab.context.new_cdp_session(tab)
        tab.wait_for_selector("#Q8")
        slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 300_000}
        line.send("Network.emulateNetworkConditions", slow)
        give(tab, png(800, 600))
        seen(tab, "took too long")


def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path, chromium):
    with used(chromium, tmp_path / "marks", script, "--no-labels") as (tab, running, behind):
        running.page.sheet.write = lambda: None  # what it would find is set below
        give(tab)
        answered(tab)
        tab.click("#Q7 .right")
        with full_disk(2000):
            tab.click("#save")
            seen(tab, "Your marks were not saved")
        assert not list((tmp_path / "marks").rglob("*.*")) or [p.name for p in (tmp_path / "marks").rglob("*.*")] == [".lock"]
        assert tab.locator("#marked").inner_text() == "Not saved." and tab.locator("#save").is_enabled()
        tab.click("#save")
        tab.locator("#marked").get_by_text("Saved: 1 mark; the sheet holds 1 image.").wait_for()
        assert tab.locator("#banner").is_hidden()
        running.page.sheet.trouble = "no room"  # for the workbook, into which the journal goes later
        tab.click("#Q6 .right")
        tab.click("#save")
        seen(tab, "Your marks are kept, but the sheet cannot be written")
        tab.locator("#marked").get_by_text("Saved: 1 mark; the sheet holds 1 image.").wait_for()


def test_marks_that_are_not_saved_are_not_lost_without_a_word(tmp_path, chromium):
    with used(chromium, tmp_path, script, "--no-labels") as (tab, running, behind):
        give(tab)
        answered(tab)
        tab.click("#Q7 .right")
        told = []
        tab.once("dialog", lambda dialog: (told.append(dialog.message), dialog.dismiss()))
        give(tab, png(seed=1), "second.png")
        assert told == ["1 mark on this image is not saved. Go on without it?"]
        assert tab.locator("#caption").inner_text().startswith("scan.png")
        assert tab.locator("#Q7 .right").get_attribute("aria-pressed") == "true"
        tab.once("dialog", lambda dialog: dialog.accept())
        give(tab, png(seed=1), "second.png")
        tab.locator("#caption").get_by_text("second.png").wait_for()
        assert answered(tab) == ANSWERS and tab.locator("#save").is_disabled()


def test_an_image_no_longer_held_is_sent_again_unseen(tmp_path, chromium):
    """As after a restart of the page."""
    with used(chromium, tmp_path, script, "--no-labels") as (tab, running, behind):
        give(tab)
        answered(tab)
        running.page.shelf.held.clear()
        tab.click("#all")
        assert answered(tab) == ANSWERS and len(running.page.shelf.held) == 1


def test_a_page_server_that_died_is_told(tmp_path, chromium):
    with used(chromium, tmp_path, script, "--no-labels") as (tab, running, behind):
        give(tab)
        answered(tab)
        tab.context.set_offline(True)
        tab.click("#all")
        seen(tab, "The page's own server does not answer")
        tab.context.set_offline(False)
        tab.click("#all")
        assert answered(tab) == ANSWERS


def test_a_second_image_stops_what_was_being_said_of_the_first(tmp_path, chromium):
    second = threading.Event()

    def slowly(prompt: str, attempt: int):
        return script(prompt, attempt) if second.is_set() else told("of the first image " * 500, SURE, pause=0.1)

    with used(chromium, tmp_path, slowly, "--no-labels") as (tab, running, behind):
        give(tab)
        tab.locator("#Q1 .text").get_by_text("of the first").wait_for()
        second.set()
        give(tab, png(seed=1), "second.png")
        tab.wait_for_selector("#Q8[data-state=unsure]")
        assert answered(tab) == ANSWERS and tab.locator("#caption").inner_text().startswith("second.png")
        waited = time.monotonic()
        while behind.open and time.monotonic() - waited < 120:
            time.sleep(0.05)
        assert not behind.open  # nobody goes on answering for the first
