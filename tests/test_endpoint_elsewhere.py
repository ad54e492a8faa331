"""An endpoint beyond this machine: what is sent is told and priced first, agreed to, and asked in the words its model takes."""

# ruff: noqa: F811 - tests take imported fixtures by their names

from __future__ import annotations

import contextlib
import http.server
import json
import threading

import pytest
from conftest import noise_image
from evaluating import data, no_report  # noqa: F401 - fixtures
from keys_and_ports import no_keys  # noqa: F401 - a fixture
from page_serving import png
from stand_in import StandIn, complete, send

import evaluate
import inference
from sonovqa import bench_answer, bench_caches, bench_load, bench_scores, chat, choosing, cli, endpoint_cost, files
from sonovqa.asking import Item
from sonovqa.bench_cases import Scoring
from sonovqa.choice import Head, Label
from sonovqa.cli import UserError
from sonovqa.endpoint import Endpoint
from sonovqa.engines import ImageRequest, LabelRequest

HEAD = Head({"Q7": (Label("normal", "normal", 11, "normal"), Label("abnormal", "abnormal", 22, "ab"))})


def item(question_id: str = "Q7", prompt: str = "Is it normal?", row: int = 0) -> Item:
    return Item(row, f"A/{row}.png", "g", "A", None, question_id, "", "", prompt, "normal")


@pytest.mark.parametrize(
    ("url", "away"),
    [("http://127.0.0.1:8000/v1", False), ("http://localhost:1", False), ("http://[::1]:8000", False),
     ("https://api.example.com/v1", True), ("http://10.0.0.7:8000/v1", True), ("http://box.clinic.lan/v1", True)],
)  # fmt: skip
def test_only_loopback_is_this_machine(url, away):
    assert endpoint_cost.is_elsewhere(url) == away


def test_estimate_counts_pixels_letters_and_the_answers_limit():
    told = endpoint_cost.estimate([item(), item("report", "x" * 400, 1)], {0: (750, 100), 1: (100, 75)}, 50)
    assert (told.images, told.requests, told.tokens_out) == (2, 2, 50 + 8 * 50)
    letters = len(chat.messages(None, "")[0]["content"][0]["text"])
    assert told.tokens_in == 100 + 10 + -(-(letters + 13) // 4) + -(-(letters + 400) // 4)
    assert told.cost(2.0, 10.0) == pytest.approx((told.tokens_in * 2 + 450 * 10) / 1e6)
    assert told.cost(None, 10.0) is None and told.cost(2.0, None) is None


@pytest.fixture
def away(monkeypatch):
    """The stand-in server listens on this machine; it is taken for one elsewhere."""
    monkeypatch.setattr(endpoint_cost, "is_elsewhere", lambda url: True)


def words(server: StandIn, data, out, *more: str) -> list[str]:
    asked = ["--endpoint", server.url, "--data", str(data), "--task", "Q7", "--out", str(out), "--resamples", "0"]
    return [*asked, "--max-images", "6", "--max-new-tokens", "10", *more]


def test_nothing_is_sent_without_consent_and_the_cost_is_told(data, tmp_path, away, capsys):
    with StandIn(lambda prompt, attempt: "normal") as server:
        with pytest.raises(UserError, match=r"6 images and their questions leave this machine for 127.0.0.1.*add --yes"):
            evaluate.main(words(server, data, tmp_path / "e"))
        assert server.bodies == [] and "cost unknown: --price-input and --price-output" in " ".join(
            capsys.readouterr().out.split()
        )
        prices = ("--price-input", "1000000", "--price-output", "0")  # so that the cost is the tokens
        with pytest.raises(UserError, match="nothing was sent"):
            evaluate.main(words(server, data, tmp_path / "e", *prices))
        said = " ".join(capsys.readouterr().out.split())
        tokens = said.partition("about ")[2].partition(" tokens in")[0]
        assert f"cost about {tokens}.00 at most" in said and server.bodies == []
        assert evaluate.main(words(server, data, tmp_path / "e", *prices, "--yes")) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "6 images and their questions leave this machine" in said
        sent = len(server.bodies)
        assert f"{sent} requests: about" in said, "grey images are counted too"
        assert evaluate.main(words(server, data, tmp_path / "e")) == 0 and len(server.bodies) == sent, "nothing left to agree to"
    scores = files.read_json(tmp_path / "e" / "scores.json")
    assert scores["questions"]["Q7"]["n"] == 6


def picture_requests(server: StandIn) -> int:
    return sum("image_url" in json.dumps(body) for body in server.bodies)


@pytest.mark.parametrize(
    ("bench", "flags", "told"),
    [(bench_answer, ("--engines", "vllm", "--in-flight", "1", "2"), "64 requests"),  # 2 levels of 16, and their warm-ups
     (bench_load, ("--users", "1", "2", "--requests", "10"), "20 requests")],
)  # fmt: skip
def test_a_benchmark_sends_nothing_without_consent(bench, flags, told, tmp_path, away, capsys):
    parser = cli.Parser()
    bench.add_arguments(parser)
    with StandIn(lambda prompt, attempt: "normal") as server:
        asked = ["--endpoint", server.url, "--rows", "2", "--size", "32x24", "--record", str(tmp_path / "r.json"), *flags]
        with pytest.raises(UserError, match=r"2 images and their questions leave this machine for 127.0.0.1.*add --yes"):
            bench.run(parser.parse_args(asked))
        assert picture_requests(server) == 0 and f"{told}: about" in capsys.readouterr().out
        with pytest.raises(UserError, match=r"--price-input -1\.0; must be 0 or more"):
            bench.run(parser.parse_args([*asked, "--price-input", "-1"]))
        assert bench.run(parser.parse_args([*asked, "--yes"])) == 0
    assert picture_requests(server) >= int(told.split()[0]) and "2 images and their questions leave" in capsys.readouterr().out


def test_rows_that_a_benchmark_scores_are_counted_too(data, tmp_path):
    measured = {"data": str(data), "split": "test", "rows": 4, "seed": 1}
    (tmp_path / "none").mkdir()
    four = bench_scores.to_send(Scoring(**measured, folder=str(tmp_path / "none")))
    assert four.images == 4 and four.tokens_out == 128 * four.requests and four.requests > 4
    assert (four + endpoint_cost.NOTHING) == four and (four + four).images == 8


def test_a_folder_of_images_is_sent_with_consent_only(tmp_path, away):
    (tmp_path / "scans").mkdir()
    for number in range(2):
        noise_image(48, 40, number).save(tmp_path / "scans" / f"{number}.png")
    with StandIn(lambda prompt, attempt: "normal") as server:
        words = ["--endpoint", server.url, "--folder", str(tmp_path / "scans"), "--out", str(tmp_path / "o.xlsx")]
        with pytest.raises(UserError, match=r"2 images and their questions leave this machine.*add --yes"):
            inference.main(words)
        assert server.bodies == []
        inference.main([*words, "--yes"])
        assert len(server.bodies) == 16
        inference.main(words)
        assert len(server.bodies) == 16, "nothing left to agree to"


def test_an_endpoint_of_this_machine_needs_no_consent(data, tmp_path, capsys):
    with StandIn(lambda prompt, attempt: "normal") as server:
        assert evaluate.main(words(server, data, tmp_path / "e")) == 0
    assert "leave this machine" not in capsys.readouterr().out


def test_the_key_comes_from_the_environment_by_the_name_given(data, tmp_path, away, monkeypatch):
    with StandIn(lambda prompt, attempt: "normal", key="secret") as server:
        with pytest.raises(UserError, match="refuses a request without a key"):
            evaluate.main(words(server, data, tmp_path / "e", "--yes"))
        with pytest.raises(UserError, match="CLINIC_KEY is not set"):
            evaluate.main(words(server, data, tmp_path / "e", "--yes", "--api-key-env", "CLINIC_KEY"))
        monkeypatch.setenv("CLINIC_KEY", "secret")
        assert evaluate.main(words(server, data, tmp_path / "e", "--yes", "--api-key-env", "CLINIC_KEY")) == 0
    kept = (tmp_path / "e").rglob("*.json*")
    assert all("secret" not in path.read_text() for path in kept), "no key is written down"


@pytest.mark.parametrize("flag", ["--price-input", "--price-output"])
def test_prices_below_nought_are_refused(flag, data, tmp_path):
    with pytest.raises(UserError, match=f"{flag} -1.0; must be 0 or more"):
        evaluate.main(["tiny", "--data", str(data), flag, "-1"])


def refusing(*fields: str):
    """A server whose model refuses fields, as OpenAI's reasoning models do."""

    def answer(handler):
        body = server.bodies[-1]
        field = next((name for name in fields if name in body), None)
        if field:
            code = "unsupported_value" if field == "temperature" else "unsupported_parameter"
            send(handler, 400, {"error": {"message": f"Unsupported: '{field}'", "param": field, "code": code}})
        else:
            complete(handler, "normal")

    server = StandIn(lambda prompt, attempt: answer)
    return server


def test_fields_that_a_model_refuses_are_left_out_from_then_on(data, capsys):
    with refusing("max_tokens", "temperature") as server:
        engine = Endpoint(server.url, "run", in_flight=1, retries=0)
        picture = evaluate.dataset.load_undecoded(data)["test"][0]["image"]["bytes"]
        prompts = tuple((f"Q{n}", f"p{n}") for n in range(3))
        replies = list(engine.answer([ImageRequest("a", picture, None, prompts)], 7))
    assert [(reply.text, reply.error) for reply in replies] == [("normal", None)] * 3
    assert len(server.bodies) == 3 + 2, "each refusal is met once"
    last = server.bodies[-1]
    assert last["max_completion_tokens"] == 7 and "max_tokens" not in last and "temperature" not in last
    assert "not greedy" in capsys.readouterr().err


def chooses(handler, server: StandIn, likely: dict[int, float], most: int = 20) -> None:
    """Answer as vLLM does: one of the allowed tokens, with the log-probabilities of (the first ``most`` of) those asked for."""
    body = server.bodies[-1]
    best = max(body["allowed_token_ids"], key=likely.get)
    told = [{"token": f"token_id:{t}", "logprob": likely[t], "bytes": None} for t in body["logprob_token_ids"][:most]]
    entry = {"token": f"token_id:{best}", "logprob": likely[best], "bytes": None, "top_logprobs": told}
    choice = {"index": 0, "message": {"role": "assistant", "content": "ab"}, "finish_reason": "length"}
    head = {"id": "x", "object": "chat.completion", "created": 0, "model": "run"}
    send(handler, 200, head | {"choices": [choice | {"logprobs": {"content": [entry]}}]})


def test_a_served_choice_run_is_asked_for_its_labels_tokens_only(data):
    picture = evaluate.dataset.load_undecoded(data)["test"][0]["image"]["bytes"]
    asked = (("Q7", "Is it normal?"), ("Q1", "List."))
    with StandIn(lambda prompt, attempt: lambda handler: chooses(handler, server, {11: -5.0, 22: -3.0})) as server:
        engine = choosing.ChoiceEndpoint(server.url, "run", in_flight=1, head=HEAD)
        replies = {r.question_id: r for r in engine.answer([ImageRequest("a", picture, None, asked)], 128)}
        wanted = LabelRequest("a", picture, None, (("Q7", "Is it normal?", ("normal", "abnormal: mass", "abnormal")),))
        (weighed,) = engine.likelihoods([wanted])
    assert replies["Q7"].text == "abnormal" and replies["Q7"].probabilities == {"normal": 0.119203, "abnormal": 0.880797}
    assert replies["Q1"].error and len(server.bodies) == 2, "what the head does not know is not sent"
    body = server.bodies[0]
    assert body["max_tokens"] == 1 and body["allowed_token_ids"] == body["logprob_token_ids"] == [11, 22]
    assert body["messages"] == chat.openai_messages(picture, "Is it normal?") and body["logprobs"] is True
    assert weighed.log_likelihoods[0] == pytest.approx(-2.126928, abs=1e-4) and weighed.log_likelihoods[2] == choosing.NEVER


def test_a_server_without_such_log_probabilities_is_said(data):
    picture = evaluate.dataset.load_undecoded(data)["test"][0]["image"]["bytes"]
    request = [ImageRequest("a", picture, None, (("Q7", "p"),))]
    with StandIn(lambda prompt, attempt: "normal") as server:
        (reply,) = choosing.ChoiceEndpoint(server.url, "run", retries=0, head=HEAD).answer(request, 1)
        assert "no log-probabilities" in reply.error
    with StandIn(lambda prompt, attempt: lambda handler: chooses(handler, server, {11: -1.0, 22: -2.0}, 1)) as server:
        engine = choosing.ChoiceEndpoint(server.url, "run", head=HEAD)
        with pytest.raises(UserError, match="gives no log-probabilities of the labels' tokens"):
            list(engine.answer(request, 1))


def test_head_names_a_choice_run_and_goes_with_an_endpoint(data, tmp_path):
    base = ["--data", str(data), "--out", str(tmp_path / "e")]
    with pytest.raises(UserError, match=r"--head .* is for --endpoint"):
        evaluate.main(["tiny", "--head", str(tmp_path), *base])
    (tmp_path / "run.json").write_text(json.dumps({"arguments": {}, "head": None}))
    with pytest.raises(UserError, match="it is no finished choice run"):
        evaluate.main(["--endpoint", "http://127.0.0.1:9", "--head", str(tmp_path), *base])
    assert choosing.serving_note(tmp_path) == ""
    (tmp_path / "run.json").write_text(json.dumps({"arguments": {}, "head": HEAD.json()}))
    note = choosing.serving_note(tmp_path / "merged")
    assert f"--head {tmp_path}" in note and '"allowed_token_ids": [11, 22]' in note and '"ab": 22' in note


@pytest.mark.parametrize("host", ["127.0.0.1", "vllm.invalid"])
def test_a_proxy_of_the_environment_gets_nothing_that_is_for_this_machine(monkeypatch, host):
    """Only what is sent elsewhere goes through it: no key, no image and no look at /metrics on the way to loopback."""
    seen = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            self.send_error(502)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_port}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_API_KEY", "a-key-of-the-proxy-test")
    with StandIn(key="a-key-of-the-proxy-test") as server:
        url = server.url.replace("127.0.0.1", host)
        asked = Endpoint(url, "run", retries=0)
        with contextlib.suppress(UserError):
            asked.check()
        (reply,) = asked.answer([ImageRequest("a.png", png(), None, (("Q1", "p"),))], 8)
        bench_caches.is_vllm(url)
    proxy.shutdown()
    proxy.server_close()
    assert (not seen and reply.text == "answer to p") if host == "127.0.0.1" else len(seen) == 3
