"""The terminal conversation: its commands, its mistakes, one-shot answers, and a local model once."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import noise_image
from PIL import Image
from stand_in import StandIn, stream

import inference
from sonovqa import chat, cli, conversation
from sonovqa.cli import UserError
from sonovqa.conversation import Conversation, Picture
from sonovqa.engines import EngineError
from sonovqa.prompt_variants import PROMPTS
from sonovqa.questions import QUESTIONS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in ("VLLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def image(tmp_path) -> Path:
    noise_image(64, 48, 1).save(tmp_path / "femur 1.png")
    return tmp_path / "femur 1.png"


@pytest.fixture
def screen(monkeypatch):
    """What the user sees, as plain text of 100 columns."""
    shown = cli.Console(file=io.StringIO(), width=100, height=40)
    monkeypatch.setattr(inference, "console", shown)
    return shown.file


class Echo:
    """An answerer that notes what it was asked; a question with "boom" in it fails, one with "half" breaks off."""

    name = "echo"

    def __init__(self):
        self.asked: list[tuple[Picture, list[str], int]] = []

    def stream(self, picture, turns, max_new_tokens):
        self.asked.append((picture, turns, max_new_tokens))
        if "boom" in turns[-1]:
            raise EngineError("the endpoint is gone")
        yield "it is "
        if "half" in turns[-1]:
            raise KeyboardInterrupt
        yield f"answer {len(self.asked)}"


@pytest.fixture
def talk(image) -> Conversation:
    made = Conversation(Echo())
    made.look_at(conversation.read_picture(image))
    return made


def type_in(talk: Conversation, monkeypatch, *lines: str, context: str | None = None) -> None:
    waiting = iter(lines)

    def typed(prompt=""):
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    inference.converse(talk, context)


def test_free_questions_carry_history_and_standard_ones_do_not(talk, monkeypatch, screen):
    type_in(talk, monkeypatch, "is the femur seen?", "/q 7", "why?")
    turns = [turns for _, turns, _ in talk.answerer.asked]
    q7 = QUESTIONS["Q7"].prompts["default"]
    assert turns[0] == ["is the femur seen?"]
    assert turns[1] == [q7]
    assert turns[2] == ["is the femur seen?", "it is answer 1", q7, "it is answer 2", "why?"]
    assert "it is answer 3" in screen.getvalue()


def test_history_is_bounded_and_goes_with_the_image(talk, image, monkeypatch, screen):
    type_in(talk, monkeypatch, *(f"question {i}" for i in range(20)), f"/image {image}", "fresh?")
    turns = [turns for _, turns, _ in talk.answerer.asked]
    assert len(turns[19]) == 2 * conversation.LONGEST_HISTORY + 1
    assert turns[19][0] == "question 7"
    assert turns[20] == ["fresh?"]


def test_forget_and_commands_in_turn(talk, monkeypatch, screen):
    type_in(talk, monkeypatch, "one", "/forget", "two", "/q", "/help", "", "/quit", "never asked")
    assert [turns for _, turns, _ in talk.answerer.asked] == [["one"], ["two"]]
    for line in ("Q8  Clinical Recommendations", "/report", "forgotten"):
        assert line in screen.getvalue()


def test_all_fills_a_table_and_report_has_more_room(talk, monkeypatch, screen):
    type_in(talk, monkeypatch, "/all", "/report")
    prompts = [turns[-1] for _, turns, _ in talk.answerer.asked]
    assert prompts == [*(q.prompts["default"] for q in QUESTIONS.values()), chat.prompt_for("report", "")]
    assert [limit for *_, limit in talk.answerer.asked] == [128] * 8 + [8 * 128]
    for number in range(1, 10):
        assert f"it is answer {number}" in screen.getvalue()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/foo", "unknown command /foo"),
        ("/q 9", "there is no question '9'"),
        ("/q seven", "there is no question 'seven'"),
        ("/image", "no path"),
        ("/image /no/such.png", "no such file; /no/such.png"),
        ("/image {folder}", "cannot use"),
        ("/image {folder}/text.png", "not an image"),
        ("/image {folder}/empty.png", "is empty"),
        ("/image {folder}/cut.png", "broken"),
        ("boom", "the endpoint is gone"),
    ],
)
def test_mistakes_and_faults_are_one_line_and_the_conversation_goes_on(talk, image, monkeypatch, screen, line, told):
    (image.parent / "text.png").write_text("hello")
    (image.parent / "empty.png").touch()
    (image.parent / "cut.png").write_bytes(image.read_bytes()[:200])
    before = talk.picture
    type_in(talk, monkeypatch, line.format(folder=image.parent), "go on?")
    errors = [text for text in screen.getvalue().splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert told in errors[0] or (told == "broken" and "truncated" in errors[0])
    assert talk.picture == before
    assert talk.answerer.asked[-1][1] == ["go on?"], "what failed is not part of the history"


def test_question_without_an_image(monkeypatch, screen):
    talk = Conversation(Echo())
    type_in(talk, monkeypatch, "what is it?", "/all")
    assert screen.getvalue().count("there is no image yet") == 2
    assert talk.answerer.asked == []


def test_ctrl_c_stops_an_answer_but_not_the_conversation(talk, monkeypatch, screen):
    type_in(talk, monkeypatch, "half", "whole?")
    assert "stopped" in screen.getvalue()
    assert talk.answerer.asked[-1][1] == ["whole?"]


@pytest.mark.parametrize("typed", ["{}", "'{}'", '"{}"', "{escaped}"])
def test_paths_as_they_are_typed_or_dropped(talk, image, monkeypatch, screen, typed):
    line = typed.format(image, escaped=str(image).replace(" ", "\\ "))
    type_in(talk, monkeypatch, f"/image {line}", context="Pixel size: 0.1 mm")
    assert talk.picture == Picture(str(image), image.read_bytes(), "Pixel size: 0.1 mm")
    assert "64 x 48 pixels" in screen.getvalue()


def test_likeness_has_the_images_colours():
    left_red = Image.new("RGB", (64, 64), "black")
    left_red.paste("red", (0, 0, 32, 64))
    text = inference.likeness(left_red, 8)
    colours = [str(span.style) for span in text.spans[:8]]
    assert colours[0] == "#ff0000 on #ff0000"
    assert colours[7] == "#000000 on #000000"
    assert len(text.plain.splitlines()) == 4


def run(*words: str, typed: str = "") -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    words = (sys.executable, str(ROOT / "inference.py"), *words)
    return subprocess.run(words, capture_output=True, text=True, input=typed, env=env, timeout=600)


def test_one_shot_through_an_endpoint(image):
    with StandIn(models=("phantoms",)) as server:
        done = run("--endpoint", server.url, "--image", str(image), "--question", "q7", "--json", "--context", "Pixel size: 1 mm")
        prose = run("--endpoint", server.url, "--image", str(image), "--question", "What is it?")
    told = json.loads(done.stdout)
    q7 = QUESTIONS["Q7"].prompts["default"]
    assert told["answers"] == [{"question_id": "Q7", "question": q7, "answer": f"answer to Image size: 64.0 x 48.0 mm\n{q7}"}]
    assert told["model"] == f"phantoms at {server.url}"
    assert (told["image"], told["notice"]) == (str(image), cli.RESEARCH_NOTICE)
    assert prose.stdout == "answer to What is it?\n"
    assert cli.RESEARCH_NOTICE in prose.stderr
    assert (
        server.bodies[0]["messages"] == chat.openai_messages(image.read_bytes(), q7, "Pixel size: 1 mm")
        and server.bodies[0]["temperature"] == 0
    )


def test_one_shot_failure_prints_nothing_that_looks_like_an_answer(image):
    with StandIn(lambda prompt, attempt: (400, "too long")) as server:
        done = run("--endpoint", server.url, "--image", str(image), "--question", "all", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no answer; HTTP 400: too long\n"


def test_piped_conversation_with_a_broken_stream(image):
    def once(handler):
        stream(handler, "normal fetal brain", 1)

    with StandIn(lambda prompt, attempt: "normal fetal brain" if attempt > 1 else once) as server:
        done = run("--endpoint", server.url, typed=f"/image {image}\n/q 7\n/nonsense\n")
    assert done.returncode == 0, done.stderr
    assert "normal fetal brain" in done.stdout
    assert "unknown command /nonsense" in done.stdout
    assert cli.RESEARCH_NOTICE.split(":")[0] in done.stdout


@pytest.fixture
def trained(tmp_path) -> Path:
    """A finished run that was trained to give its verdict on Q7 first."""
    (tmp_path / "run" / "merged").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"prompt_variant": "Q7=structured"}))
    return tmp_path / "run"


def asked_with(words: list[str], monkeypatch) -> dict[str, str]:
    """The prompts that one-shot answers were asked with, by question id."""
    echo = Echo()
    monkeypatch.setattr(inference, "answerer", lambda args: echo)
    inference.main(words)
    texts = [turns[-1] for _, turns, _ in echo.asked]
    return {q: name for q, prompts in PROMPTS.items() for name, text in prompts.items() if text in texts}


def test_a_run_is_asked_with_its_own_prompts_unless_told_otherwise(trained, image, monkeypatch):
    own = dict.fromkeys(QUESTIONS, "default") | {"Q7": "structured"}
    for run_ in (trained, trained / "merged"):
        assert asked_with(["--run", str(run_), "--image", str(image), "--question", "all"], monkeypatch) == own
    words = ["--run", str(trained), "--image", str(image), "--question"]
    assert asked_with([*words, "Q7"], monkeypatch) == {"Q7": "structured"}
    assert asked_with([*words, "Q2"], monkeypatch) == {"Q2": "default"}
    assert asked_with([*words, "report", "--prompts", "paraphrase"], monkeypatch) == {"report": "paraphrase"}
    some = dict.fromkeys(QUESTIONS, "short") | {"Q7": "simple"}
    assert asked_with([*words, "ALL", "--prompts", "short,Q7=simple"], monkeypatch) == some


def test_what_is_no_run_is_asked_the_default(tmp_path):
    assert conversation.prompts_line(None, "some/model") == conversation.prompts_line(None, None) == "default"
    assert conversation.prompts_line(None, str(tmp_path)) == "default"


@pytest.mark.parametrize("many", [True, False], ids=["folder", "conversation"])
def test_a_folder_and_a_conversation_are_asked_with_the_runs_own_prompts(trained, image, monkeypatch, many, tmp_path, screen):
    asked = []
    monkeypatch.setattr(inference, "answerer", lambda args: asked.append(args.prompts) or sys.exit(0))
    words = ["--folder", str(image.parent), "--out", str(tmp_path / "x.xlsx")] if many else ["--image", str(image)]
    with pytest.raises(SystemExit):
        inference.main(["--run", str(trained), *words])
    assert asked == ["Q7=structured"]


@pytest.fixture
def prepared(tmp_path) -> Path:
    """A prepared set's test split of two images, the second with a context."""
    import datasets

    def encoded(seed):
        noise_image(48, 32, seed).save(stream_ := io.BytesIO(), "PNG")
        return {"bytes": stream_.getvalue(), "path": None}

    rows = {"image_id": ["a/1.png", "b/2.png"], "image": [encoded(1), encoded(2)], "context": [None, "Pixel size: 2 mm"]}
    split = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"test": split}).save_to_disk(tmp_path / "set")
    return tmp_path / "set"


@pytest.mark.parametrize(
    ("words", "context"),
    [([], "Pixel size: 2 mm"), (["--context", "Pixel size: 3 mm"], "Pixel size: 3 mm"), (["--context", ""], "")],
)
def test_a_context_that_is_given_stands_for_the_sets(prepared, monkeypatch, words, context):
    echo = Echo()
    monkeypatch.setattr(inference, "answerer", lambda args: echo)
    inference.main(["--run", "tiny", "--data", str(prepared), "--image", "b/2.png", "--question", "Q1", *words])
    assert [picture.context for picture, *_ in echo.asked] == [context]


def test_picture_of_a_prepared_set(prepared):
    first, second = conversation.picture_of_set(prepared), conversation.picture_of_set(prepared, "b/2.png")
    assert (first.name, first.context) == ("a/1.png", None)
    assert (second.name, second.context) == ("b/2.png", "Pixel size: 2 mm")
    assert chat.open_image(second.data).tobytes() == noise_image(48, 32, 2).tobytes()
    with pytest.raises(UserError, match="no image 'c' in the test split"):
        conversation.picture_of_set(prepared, "c")
    with pytest.raises(UserError, match="no image in the validation split"):
        conversation.picture_of_set(prepared, split="validation")


def test_local_model_answers_in_a_conversation(tmp_path, tokenizer, image):
    """A random tiny model: whatever it says, it says the same streamed, one-shot and as the local engine does."""
    from sonovqa import generation, tiny
    from sonovqa.conversation import LocalAnswerer
    from sonovqa.engines import ImageRequest

    folder = tmp_path / "run" / "merged"
    tiny.make_model(tokenizer, "small").save_pretrained(folder)
    tiny.make_processor(tokenizer).save_pretrained(folder)
    made = LocalAnswerer(str(tmp_path / "run"))
    talk = Conversation(made, max_new_tokens=8)
    talk.look_at(conversation.read_picture(image, "Pixel size: 0.1 mm"))
    streamed = "".join(talk.ask_standard("Q7")).strip()
    engine = generation.LocalEngine(made.model, made.processor)
    request = ImageRequest("i", image.read_bytes(), "Pixel size: 0.1 mm", (("Q7", QUESTIONS["Q7"].prompts["default"]),))
    assert streamed == next(engine.answer([request], 8)).text
    assert list(talk.ask("and why?"))
    assert len(talk.history) == 4
