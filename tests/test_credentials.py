"""Keys stay where they are: not in errors, files, MLflow's records or addresses."""

from __future__ import annotations

import argparse
import json

import pytest
from stand_in import StandIn, send
from test_endpoint import ask, engine, only

from sonovqa import answering, chat, credentials, records
from sonovqa.cli import UserError
from sonovqa.endpoint import Endpoint
from sonovqa.engines import EngineError

KEY = "sk-a-key-of-the-test"


@pytest.fixture(autouse=True)
def one_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("VLLM_API_KEY", KEY)


@pytest.mark.parametrize("ending", ["\n", "\r", " ", "\0", "é"])
def test_key_that_no_header_may_hold_is_told_without_quoting_it(monkeypatch, ending):
    """httpx puts the whole header into its error: ``Illegal header value b'Bearer sk-…'``."""
    monkeypatch.setattr("os.environ", {"VLLM_API_KEY": KEY + ending})
    with StandIn() as server, pytest.raises(UserError, match="no HTTP header may") as mistake:
        ask(engine(server), "p")
    assert KEY not in str(mistake.value) and server.bodies == []


def echoed(handler) -> None:
    """Sends the request's headers back, as debugging proxies do."""
    send(handler, 400, {"error": {"message": f"bad request: {dict(handler.headers)}"}})


def test_server_that_sends_headers_back_does_not_get_the_key_into_an_error():
    with StandIn(lambda prompt, attempt: echoed) as server:
        reply = only(ask(engine(server), "p"))
        with pytest.raises(EngineError) as fault:
            list(engine(server).stream(chat.openai_messages(b"", "p"), 5))
    for told in (reply.error, str(fault.value)):
        assert "Bearer [key]" in told and KEY not in told
    assert KEY not in repr(fault.value.__cause__), "a traceback would show it"


@pytest.mark.parametrize("url", ["me:{}@host/v1", "{}@host", "host/v1?key={}", "host/#{}", "host:{}/v1"])
def test_address_with_a_key_is_refused_before_anything_is_written(url, tmp_path):
    url = f"http://{url.format(KEY)}"
    for use in (
        Endpoint,
        lambda url: answering.output_folder(argparse.Namespace(endpoint=url, run=None, model="m", out=tmp_path)),
    ):
        with pytest.raises(UserError, match="URL") as mistake:
            use(url)
        assert KEY not in str(mistake.value)


def test_key_given_in_place_of_its_variables_name_is_not_shown():
    with pytest.raises(UserError, match="no variable's name") as mistake:
        Endpoint("http://host", key_env=KEY)
    assert KEY not in str(mistake.value)


@pytest.mark.parametrize("name", ["..", ".", "../../etc", "/etc/cron.d", "...", "a/../../b", "\0"])
def test_served_name_never_becomes_a_path_outside_outputs(name):
    args = argparse.Namespace(endpoint="http://h:1/v1", run=None, model=name, out=None, task="all", split="test", adapter=False)
    folder = answering.output_folder(args)
    assert len(folder.parts) == 3 and folder.parts[0] == "outputs" and not set(folder.parts) & {"..", "."}


def test_password_of_a_tracking_server_is_not_written(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://me:{KEY}@host:5000/mlflow")
    assert credentials.without_userinfo(records.tracking_uri(tmp_path)) == "https://host:5000/mlflow"
    assert credentials.without_userinfo("sqlite:////a/b@c/mlflow.db") == "sqlite:////a/b@c/mlflow.db"


def test_evaluation_leaves_the_key_in_none_of_its_files(tmp_path, data):
    import evaluate

    with StandIn(key=KEY) as server:
        evaluate.main(["--endpoint", server.url, "--data", str(data), "--out", str(tmp_path / "out"), "--resamples", "0"])
    written = [path for path in (tmp_path / "out").iterdir() if KEY.encode() in path.read_bytes()]
    assert written == [] and json.loads((tmp_path / "out" / "scores.json").read_text())["overall"]["failed"] == 0
