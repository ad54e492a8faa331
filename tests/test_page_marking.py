"""Marks, details and questions in the page's browser: nothing ends up with the wrong image, nothing is lost without a word."""

from __future__ import annotations

import json
import threading

from keys_and_ports import no_keys  # noqa: F401 - a fixture
from openpyxl import load_workbook
from page_serving import (
    ANSWERS,
    SMALL,
    SURE,
    answered,
    dialogues,
    give,
    png,
    script,
    system_chromium,  # noqa: F401 - a fixture
    told,
    used,
    with_answers,
)

from sonovqa import chat, marks_book
from sonovqa.questions import REPORT_ID

DETAILS = {"patient": "P-7", "context": "Pixel size: 0.1 mm", "category": "Brain"}


def details(tab) -> dict[str, str]:
    return {name: tab.locator(f"#{name}").input_value() for name in DETAILS}


def test_details_stay_with_the_image_that_they_were_given_for(tmp_path, chromium):
    """Given before the first image they are meant for it; the image after it has none of them."""
    with used(chromium, tmp_path, script, "--no-labels") as (tab, running, behind):
        tab.wait_for_selector("#Q8")
        tab.click("summary")
        tab.fill("#patient", "P-7")
        tab.fill("#context", DETAILS["context"])
        tab.select_option("#category", index=1)
        before = details(tab)
        give(tab)
        answered(tab)
        assert details(tab) == before and all(before.values())
        give(tab, png(seed=1), "second.png")
        tab.locator("#caption").get_by_text("second.png").wait_for()
        answered(tab)
        assert details(tab) == dict.fromkeys(DETAILS, "")
    assert DETAILS["context"] not in json.dumps(behind.bodies[8:])


def test_a_mark_made_while_others_are_saved_is_not_taken_for_saved(tmp_path, chromium):
    with with_answers(tmp_path, chromium) as (tab, running):
        saving, marked, save = threading.Event(), threading.Event(), running.page.sheet.save

        def slow(*marks):
            saving.set()
            assert marked.wait(120)
            return save(*marks)

        running.page.sheet.save = slow
        tab.click("#Q1 .right")
        tab.click("#save")
        assert saving.wait(120)
        tab.click("#Q2 .right")
        marked.set()
        tab.locator("#marked").get_by_text("Saved: 1 mark; the sheet holds 1 image. 1 mark not saved yet.").wait_for()
        asked = dialogues(tab, accept=False)
        give(tab, png(seed=1), "second.png")
        assert asked == ["1 mark on this image is not saved. Go on without it?"]
        tab.click("#save")  # what is in the sheet already is not written again
        tab.locator("#marked").get_by_text("Saved: 1 mark; the sheet holds 1 image.", exact=True).wait_for()
        give(tab, png(seed=1), "second.png")
        tab.locator("#caption").get_by_text("second.png").wait_for()
        assert len(asked) == 1


def test_a_correction_is_not_wiped_by_asking_its_question_again_without_a_word(tmp_path, chromium):
    with with_answers(tmp_path, chromium) as (tab, running):
        tab.click("#Q5 .wrong")
        tab.fill("#Q5 input", "13-15 weeks")
        asked = dialogues(tab, accept=False)
        tab.click("#Q5 .again")
        assert len(asked) == 1 and tab.locator("#Q5 input").input_value() == "13-15 weeks"
        tab.click("#Q1 .again")  # nothing is marked there
        answered(tab)
        assert len(asked) == 1 and tab.locator("#Q5 input").input_value() == "13-15 weeks"


def test_nothing_is_asked_again_while_answers_stream(tmp_path, chromium):
    go_on = threading.Event()

    def waiting(prompt: str, attempt: int):
        def answer(handler):
            assert go_on.wait(120)
            script(prompt, attempt)(handler)

        return answer if "plane" in prompt.lower() else script(prompt, attempt)

    with used(chromium, tmp_path, waiting, "--no-labels") as (tab, running, behind):
        give(tab)
        tab.wait_for_selector("#Q1[data-state=done]")
        assert tab.locator("#all").is_disabled() and tab.locator("#Q1 .again").is_disabled()
        go_on.set()
        assert answered(tab) == ANSWERS
        assert tab.locator("#all").is_enabled() and tab.locator("#Q1 .again").is_enabled()


def test_a_file_that_cannot_be_used_in_mid_stream_leaves_cards_that_can_be_asked_again(tmp_path, chromium):
    good = threading.Event()

    def slowly(prompt: str, attempt: int):
        return script(prompt, attempt) if good.is_set() else told("of the first image " * 500, SURE, pause=0.1)

    with used(chromium, tmp_path, slowly, "--no-labels") as (tab, running, behind):
        give(tab)
        tab.locator("#Q1 .text").get_by_text("of the first").wait_for()
        give(tab, b"%PDF-1.7", "other.png")
        tab.locator("#Q1[data-state=error] .problem").get_by_text("Stopped").wait_for()
        good.set()
        tab.click("#all")
        assert answered(tab) == ANSWERS


def test_a_long_conversation_goes_on_with_its_latest_texts(tmp_path, chromium):
    """Its 15th question, after an answer longer than may go along."""

    def lengthy(prompt: str, attempt: int):
        return told("x" * 9000, SURE) if prompt == "long ?" else script(prompt, attempt)

    with used(chromium, tmp_path, lengthy, "--no-labels") as (tab, running, behind):
        give(tab)
        answered(tab)
        for number in range(14):
            tab.fill("#question", "long ?" if number == 13 else f"Is this ? number {number}")
            tab.press("#question", "Enter")
            tab.wait_for_selector("#send:enabled")
        tab.fill("#question", "And ? now")
        tab.press("#question", "Enter")
        tab.locator(".said").get_by_text("you asked: And ? now").wait_for()
        assert tab.locator(".problem:visible").count() == 0
    turns = behind.bodies[-1]["messages"]
    assert len(turns) == 1 + 24 + 1 and turns[-2]["content"][0]["text"] == "x" * 8000


def test_what_was_asked_and_what_a_percentage_means_can_be_read_without_a_mouse(tmp_path, chromium):
    with used(chromium, tmp_path, script) as (tab, running, behind):
        give(tab)
        answered(tab)
        assert "What" in tab.locator("#Q2 .prompt").inner_text() and tab.locator("[title]").count() == 0
        assert tab.locator("#Q1 .of").inner_text() == "The percentage is the probability of this wording."
        assert tab.locator("#Q7 .of").inner_text().endswith("is the probability of this label.")
        tab.set_viewport_size({"width": 390, "height": 844})
        tab.click("summary")
        tab.click("#Q2 .wrong")
        assert tab.evaluate(SMALL) == [] and tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_mark_that_was_saved_can_be_taken_back(tmp_path, chromium):
    with with_answers(tmp_path, chromium) as (tab, running):
        tab.click("#Q1 .right")
        tab.click("#Q1 .right")
        assert tab.locator("#save").is_disabled()  # nothing was saved that could be taken back
        for question_id in ("Q1", "Q2"):
            tab.click(f"#{question_id} .right")
        tab.click("#save")
        tab.locator("#marked").get_by_text("Saved: 2 marks").wait_for()
        tab.click("#Q2 .again")  # asked again: what was said of the answer before stands
        answered(tab)
        assert tab.locator("#save").is_disabled()
        tab.click("#Q1 .right")
        asked = dialogues(tab, accept=False)
        give(tab, png(seed=1), "second.png")
        assert asked == ["1 mark on this image is not saved. Go on without it?"]
        tab.click("#save")
        tab.locator("#marked").get_by_text("Saved: 1 mark").wait_for()
        assert tab.locator("#save").is_disabled()
    marks_book.bring_up_to_date(running.page.sheet.path)
    answers, log = load_workbook(running.page.sheet.path).worksheets
    row = dict(zip(marks_book.HEADER, next(answers.iter_rows(min_row=2, values_only=True)), strict=True))
    assert [value for name, value in row.items() if name[:2] in ("Q1", "Q2")] == [None, ANSWERS["Q2"]]
    assert [row[6] for row in log.iter_rows(min_row=2, values_only=True)] == ["right", "right", "withdrawn"]


def test_a_report_printed_while_answers_come_has_the_date_of_its_own_image(tmp_path, chromium):
    second = threading.Event()

    def slowly(prompt: str, attempt: int):
        return told("so far " * 300, SURE, pause=0.1) if second.is_set() else script(prompt, attempt)

    with used(chromium, tmp_path, slowly, "--no-labels") as (tab, running, behind):
        tab.clock.set_fixed_time("2021-02-03T10:00:00Z")
        give(tab)
        answered(tab)
        second.set()
        tab.clock.set_fixed_time("2022-02-03T10:00:00Z")
        give(tab, png(seed=1), "second.png")
        tab.locator("#Q1 .text").get_by_text("so far").wait_for()
        tab.evaluate("dispatchEvent(new Event('beforeprint'))")
        paper = tab.locator("#report").text_content()
        assert "2022" in paper and "2021" not in paper


def test_a_mark_names_the_model_that_answered_and_not_the_one_served_since(tmp_path, chromium):
    with with_answers(tmp_path, chromium) as (tab, running):
        before, running.page.endpoint.model = running.page.endpoint.name, "another"
        tab.click("#Q1 .right")
        tab.click("#save")
        tab.locator("#marked").get_by_text("Saved: 1 mark").wait_for()
    marks_book.bring_up_to_date(running.page.sheet.path)
    (row,) = load_workbook(running.page.sheet.path).worksheets[1].iter_rows(min_row=2, values_only=True)
    assert row[3] == before != running.page.endpoint.name


def on_paper(tab) -> dict[str, str]:
    """The facts beside the image on the printed report."""
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    names, values = (tab.locator(f"#report {kind}").all_text_contents() for kind in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


def test_a_report_names_the_model_and_the_context_that_each_answer_was_made_with(tmp_path, chromium):
    """Not what is served, or stands in the field, when it is printed."""

    def reporting(prompt: str, attempt: int):
        return told("all is well", SURE) if chat.prompt_for(REPORT_ID, "") in prompt else script(prompt, attempt)

    with used(chromium, tmp_path, reporting, "--no-labels") as (tab, running, behind):
        tab.wait_for_selector("#Q8")
        tab.click("summary")
        tab.fill("#context", "Pixel size: 0.1 mm")
        give(tab)
        answered(tab)
        tab.click("#whole")
        tab.wait_for_selector("#whole:enabled")
        tab.fill("#context", "Pixel size: 9 mm")
        running.page.endpoint.model = "another"
        paper = on_paper(tab)
        assert (paper["Model"], paper["Told to the model"]) == ("run", "Pixel size: 0.1 mm")
        tab.fill("#context", "")
        tab.click("#Q3 .again")
        answered(tab)
        paper = on_paper(tab)
        assert paper["Model"].startswith("run (") and paper["Model"].endswith("; another (Imaging Plane)")
        assert paper["Told to the model"].endswith("; nothing (Imaging Plane)")
        by = tab.locator("#report h2 + .hint").text_content()
        assert by.endswith(", run, told: Pixel size: 0.1 mm")
