"""A server is ready once it answers as the run did; one that does not is stopped, and what could not be asked is said."""

from __future__ import annotations

import contextlib
import http.server
import threading
from pathlib import Path

import pytest
from keys_and_ports import no_keys  # noqa: F401 - a fixture
from stand_in import StandIn

from sonovqa import dataset, files, served_check, serving
from sonovqa.cli import UserError
from sonovqa.serving_plan import Plan, Weights


@pytest.fixture
def run(tmp_path, data) -> Path:
    """A run of two rows, whose answers are those of `StandIn`."""
    items = [{"split": "train", "row": row, "branches": list(range(8))} for row in (0, 1, 0)]
    plan = {"run": "clinic", "arguments": {"data": str(data), "task": "all"}, "prompt_variant": "default", "data": "toy"}
    plan |= {"check_items": items}
    prompts = {request.image_id: dict(request.prompts) for request in served_check.check_requests(plan)}
    answers = [
        {"row": row, "question_id": q, "answer": f"answer to {prompt}"} for row in prompts for q, prompt in prompts[row].items()
    ]
    files.write_json(tmp_path / "plan.json", plan)
    files.write_json(tmp_path / "merge.json", {"answers": answers})
    return tmp_path


def plan_of(url: str, run: Path) -> Plan:
    log = run / "serve.log"
    log.write_text("all is well")
    return Plan("run", [], {}, "127.0.0.1", 0, url, log, Weights("run", "m", {}, {"run": run}, run))


def test_check_rows_are_numbered_as_in_training_and_a_choice_run_is_asked_its_own_questions(data):
    """Rows within the images trained on, branches within the questions that the head answers."""
    arguments = {"data": str(data), "task": "all", "max_images": 3, "seed": 1}
    run = {"arguments": arguments, "prompt_variant": "default", "check_items": [{"split": "train", "row": 2, "branches": [0]}]}
    stored = dataset.trained_on(arguments)["train"]
    (request,) = served_check.check_requests(run)
    assert len(stored) == 3 and request.image == stored[2]["image"]["bytes"] and request.prompts[0][0] == "Q1"
    labels = [{"name": name, "answer": name, "token": k, "spelt": name} for k, name in enumerate(("normal", "abnormal"))]
    (chosen,) = served_check.check_requests(run | {"head": {"kind": "choice", "sets": {"Q7": labels}}})
    assert [question for question, _ in chosen.prompts] == ["Q7"] and chosen.image == request.image


def test_ready_after_a_first_request_and_the_rows(run, capsys):
    with StandIn() as server:
        serving.make_ready(plan_of(server.url, run), check=True)
    told = capsys.readouterr().out
    assert "run: first answers after" in told and "16 of 16 answers to 2 images are those of the merge check" in told
    assert told.splitlines()[-1] == f"ready: {server.url}"
    assert len(server.bodies) == 8 + 16, "a row that was sampled twice is asked once"
    assert {body["max_tokens"] for body in server.bodies} == {served_check.ANSWER_TOKENS}


def test_other_answers_stop_it_unless_nobody_asks(run, capsys):
    with StandIn(lambda prompt, attempt: "normal") as server:
        with pytest.raises(UserError, match=r"0 of 16 answers.*'answer to .*' then, 'normal' now; at least 90% are needed"):
            serving.make_ready(plan_of(server.url, run), check=True)
        assert "ready" not in capsys.readouterr().out
        serving.make_ready(plan_of(server.url, run), check=False)
        assert "ready" in capsys.readouterr().out


def test_a_few_other_answers_are_remarked_on(run, capsys):
    def other(prompt: str, attempt: int) -> str:
        return "normal" if prompt.startswith("What is the fetal") else f"answer to {prompt}"

    with StandIn(other) as server, pytest.raises(UserError, match="14 of 16"):
        serving.make_ready(plan_of(server.url, run), check=True)
    answers = files.read_json(run / "merge.json")["answers"]
    files.write_json(
        run / "merge.json", {"answers": [one for one in answers if one["question_id"] != "Q2" or one["row"] == "train 0"]}
    )
    with StandIn(other) as server:
        serving.make_ready(plan_of(server.url, run), check=True)
    told = capsys.readouterr().out
    assert "14 of 15 answers" in told and "(97% and more are usual)" in told and "ready" in told


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda run: (run / "merge.json").unlink(), "holds no answers of its merge check; python -m sonovqa.merging"),
        (lambda run: change(run, data="another"), "is another data set by now"),
        (lambda run: change(run, arguments={"data": "/nowhere", "task": "all"}), "its check rows cannot be asked"),
        (lambda run: (run / "merge.json").write_text('{"answers": ['), "merge.json is broken: Expecting value"),
        (lambda run: (run / "merge.json").write_bytes(b"\xff\xfe"), "merge.json is broken"),
        (lambda run: (run / "plan.json").write_text("[]"), "plan.json is broken: an object is missing"),
        (lambda run: (run / "plan.json").write_text('{"arguments": {}}'), "plan.json is broken: data is missing"),
        (lambda run: (run / "plan.json").unlink(), "its check rows cannot be asked"),
    ],
)
def test_rows_that_cannot_be_asked_are_told_and_hold_nothing_up(run, spoil, told, capsys):
    spoil(run)
    with StandIn() as server:
        serving.make_ready(plan_of(server.url, run), check=True)
    said = capsys.readouterr().out
    assert f"not compared with its merge check: {said.split('check: ', 1)[1].splitlines()[0]}" in said and told in said
    assert "ready" in said


def change(run: Path, **changed) -> None:
    files.write_json(run / "plan.json", files.read_json(run / "plan.json") | changed)


def test_a_healthy_server_that_does_not_answer_is_not_ready(run):
    with StandIn(lambda prompt, attempt: (400, "out of order")) as server, pytest.raises(UserError, match="healthy and does not"):
        serving.make_ready(plan_of(server.url, run), check=True)


def test_the_merge_writes_its_answers_down(base, data):
    from sonovqa import merging, models

    items = [{"split": "train", "row": 0, "branches": [0, 6], "weights": [1.0, 1.0]}]
    run = {"arguments": {"data": str(data), "task": "all"}, "prompt_variant": "default", "check_items": items}
    made = merging.greedy_answers(run, models.load_processor(str(base)), merging.load_16_bit(str(base), None).eval())
    assert [(one["row"], one["question_id"]) for one in made] == [("train 0", "Q1"), ("train 0", "Q7")]


def test_a_key_from_a_file_is_in_the_environment_alone(tmp_path, monkeypatch):
    key = tmp_path / "key"
    for text, told in (("", "holds no key"), ("two words\n", "holds no key"), (None, "cannot be read")):
        key.unlink(missing_ok=True)
        if text is not None:
            key.write_text(text)
        monkeypatch.setenv("VLLM_API_KEY_FILE", str(key))
        with pytest.raises(UserError, match=told):
            serving.take_key()
    key.write_text("s3cret\n")
    monkeypatch.setenv("VLLM_API_KEY", "")
    serving.take_key()
    assert serving.os.environ["VLLM_API_KEY"] == "s3cret"
    monkeypatch.setenv("VLLM_API_KEY", "another")
    serving.take_key()
    assert serving.os.environ["VLLM_API_KEY"] == "another"


@contextlib.contextmanager
def metrics(text: str):
    """A server with nothing but metrics; yields its API's URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_requests_in_flight_are_counted_by_vllms_metrics():
    told = '# HELP vllm:num_requests_running x\nvllm:num_requests_running{e="0"} 2.0\nvllm:num_requests_waiting{e="0"} 3.0\n'
    with metrics(told + 'vllm:num_requests_running{e="1"} 1.0\nvllm:num_requests_waiting_by_reason{r="x"} 9.0\n') as url:
        assert serving.in_flight(url) == 6
    assert serving.in_flight(url) == 0 and serving.in_flight(url, 4) == 4
