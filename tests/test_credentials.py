"""Keys stay where they are: not in errors, files, MLflow's records or addresses."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from endpoint_asking import ask, engine, only
from stand_in import StandIn, send

from sonovqa import answering, chat, credentials, experiments_records, files, tracking_mlflow
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


@pytest.mark.parametrize("before", [0, 90, 195, 199, 400])
def test_a_key_is_hidden_before_a_text_is_cut(before, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", KEY)
    text = "." * before + KEY + "\n end"
    for told in (credentials.hidden(text, KEY, 200), credentials.hub_fault(OSError(text), 200)):
        assert KEY[:4] not in told and "\n" not in told and len(told) <= 200
    assert credentials.hub_fault(OSError(""), 200) == "OSError"


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
    assert credentials.without_userinfo(tracking_mlflow.tracking_uri(tmp_path)) == "https://host:5000/mlflow"
    assert credentials.without_userinfo("sqlite:////a/b@c/mlflow.db") == "sqlite:////a/b@c/mlflow.db"


def test_evaluation_leaves_the_key_in_none_of_its_files(tmp_path, data):
    import evaluate

    with StandIn(key=KEY) as server:
        evaluate.main(["--endpoint", server.url, "--data", str(data), "--out", str(tmp_path / "out"), "--resamples", "0"])
    written = [path for path in (tmp_path / "out").iterdir() if KEY.encode() in path.read_bytes()]
    assert written == [] and json.loads((tmp_path / "out" / "scores.json").read_text())["overall"]["failed"] == 0


def test_report_with_its_images_goes_to_no_tracking_server(monkeypatch, tmp_path):
    run, sent = tmp_path / "run", []
    score = {"value": 0.5}
    made = {
        "overall": {"metrics": {"accuracy": score}},
        "questions": {"Q7": {"headline": "accuracy", "metrics": {"accuracy": score}}},
    }
    files.write_json(run / "eval-test" / "scores.json", made)
    files.write_json(run / tracking_mlflow.TRACKED, {})
    monkeypatch.setattr(
        tracking_mlflow, "attach", lambda folder, artefacts, metrics: sent.append([path.name for path in artefacts])
    )
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    experiments_records.track(run)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    experiments_records.track(run)
    assert sent == [["scores.json", "report.html"], ["scores.json"]]


def test_no_library_is_left_to_send_usage_statistics():
    told = "off(), c.HF_HUB_DISABLE_TELEMETRY, os.environ['UNSLOTH_DISABLE_STATISTICS'], os.environ['VLLM_NO_USAGE_STATS']"
    code = "import os; from sonovqa import cli; from mlflow.telemetry.utils import is_telemetry_disabled as off; "
    code += f"from huggingface_hub import constants as c; print({told})"
    env = {k: v for k, v in os.environ.items() if "TELEMETRY" not in k and k not in ("DO_NOT_TRACK", "CI")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "1", "1"]


class Runs:
    """A pickle that leaves a file behind where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("loader", ["models.load_for_inference", "merging.load_16_bit", "bertscore.BertScore", "models.locate"])
def test_pickled_weights_are_never_loaded(loader, base, tmp_path):
    import importlib

    folder = shutil.copytree(base, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(tmp_path / "it ran")))
    module, _, name = loader.partition(".")
    more = {"load_for_inference": (16,), "load_16_bit": (None,)}.get(name, ())
    with pytest.raises((UserError, OSError)) as refused:
        getattr(importlib.import_module(f"sonovqa.{module}"), name)(str(folder), *more)
    assert "safetensors" in str(refused.value) and not (tmp_path / "it ran").exists()
