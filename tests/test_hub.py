"""Pushing a run to a stand-in for the hub: every byte of it, its card, and what is told before any training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import running
import yaml
from conftest import ROOT
from hub_stand_in import TOKEN, Hub

import train
from sonovqa import choice, files, hub, model_card
from sonovqa.cli import RESEARCH_NOTICE, UserError
from sonovqa.questions import QUESTIONS

SECRETS = ("Jane-Doe", "St-Elsewhere", "P0042", "Doe, Jane")


@pytest.fixture
def server(monkeypatch):
    from huggingface_hub import constants

    with Hub() as made:
        for name, value in {"ENDPOINT": made.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield made


def score(value: float, **more) -> dict:
    beside = {"value": 0.25, "difference": value - 0.25, "difference_interval": [0.1, 0.2], "n": 40}
    figure = {"value": value, "interval": [value - 0.1, value + 0.1], "n": 40, "groups": 10, "higher_is_better": True}
    return figure | {"majority": beside, "blind": beside} | more


def scores_of(run: dict) -> dict:
    """As evaluate.py writes them, with names of patients wherever a text of the data set gets in."""
    finding = {
        "kind": "recall near zero",
        "question": "Q7",
        "figure": 0.0,
        "text": "Q7: hardly ever found: “Doe, Jane”",
        "serious": True,
    }
    about = {"unread": 3, "failed": 0, "headline": "balanced accuracy", "majority_answer": "Doe, Jane",
             "metrics": {"balanced accuracy": score(0.61), "accuracy": score(0.9)}}  # fmt: skip
    return {
        "verdict": "Not above its baselines on 1 of 1 questions: Q7.", "findings": [finding], "questions": {"Q7": about},
        "intervals": {"level": 0.95, "resamples": 100, "groups": 10}, "blind": True,
        "data": {"path": "data/St-Elsewhere", "fingerprint": run["data"], "split": "test", "images": 40},
        "arguments": {"run": "outputs/Jane-Doe", "adapter": False, "endpoint": None},
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory) -> Path:
    """A run on a data set in a folder that names a clinic, merged and evaluated."""
    home = tmp_path_factory.mktemp("hub")
    clinic = shutil.copytree(data, home / "St-Elsewhere")
    about = {"fingerprint": "toy", "source": {"kind": "sheet", "sheets": {"Jane-Doe.xlsx": "1"}}, "dropped": {"x": ["P0042"]},
             "splits": {"train": {"images": 16, "groups": 16}}}  # fmt: skip
    files.write_json(clinic / "dataset.json", about)
    run = running.run(base, clinic, home, "tuned")
    files.write_json(home / "tuned" / "eval-test" / "scores.json", scores_of(run))
    return home / "tuned"


def metadata(card: bytes) -> dict:
    return yaml.safe_load(card.decode().split("---")[1])


@pytest.mark.parametrize("merged", [False, True])
def test_every_file_arrives_as_it_is(server, trained, merged):
    hub.push(trained, "clinic/tuned", merged)
    repo, home = server.repos["clinic/tuned"], trained / ("merged" if merged else "adapter")
    assert repo["private"] and len(repo["commits"]) == 1
    wanted = {p.name for p in home.iterdir() if p.suffix in (".safetensors", ".json", ".jinja")}
    assert set(repo["files"]) == wanted | {"README.md"} and any(name.endswith(".safetensors") for name in wanted)
    changed = {name for name in wanted if repo["files"][name] != (home / name).read_bytes()}
    assert changed == (set() if merged else {"adapter_config.json"}), "only the base's folder is written otherwise"
    if not merged:
        before, after = (
            json.loads(d) for d in ((home / "adapter_config.json").read_bytes(), repo["files"]["adapter_config.json"])
        )
        assert after == before | {"base_model_name_or_path": model_card.LOCAL_BASE}
    assert any(asked.startswith("PUT /storage/") for asked in server.asked)


def test_nothing_pushed_names_a_patient_a_clinic_or_a_folder_of_this_machine(server, trained):
    hub.push(trained, "clinic/tuned")
    hub.push(trained, "clinic/merged", merged=True)
    for repo in server.repos.values():
        for name, data in repo["files"].items():
            pictures = ("data:image", "<img", "![") if name == "README.md" else ()
            for secret in (*SECRETS, str(trained.parent), TOKEN, *pictures):
                assert secret.encode() not in data, (name, secret)


def test_card_says_what_it_is_what_it_scores_and_what_it_is_not_for(server, trained):
    hub.push(trained, "clinic/tuned")
    card = server.repos["clinic/tuned"]["files"]["README.md"]
    text, told = card.decode(), metadata(card)
    assert RESEARCH_NOTICE in text and "sheet, fingerprint `toy`: 16 images of 16 patients" in text
    assert "| Q7 | balanced accuracy ↑ | 0.61 [0.51, 0.71] | 0.25 | 0.25 | - | 40 | 3 |" in text
    assert "Not above its baselines on 1 of 1 questions: Q7." in text and "- recall near zero: Q7" in text
    assert all(f"## {title}" in text for title in ("Training", "Scores", "Limits", "Use", "Licence", "Citation"))
    (result,) = told["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 0.61 and "95 % interval 0.510 to 0.710, n = 40" in result["metrics"][0]["name"]
    assert (told["library_name"], told["pipeline_tag"]) == ("peft", "image-text-to-text")
    assert "license" not in told and "base_model" not in told, "a local base has no name that others could know"


def test_card_of_a_hub_base_names_it_and_its_licence(server, trained):
    server.licences["Qwen/Qwen3-VL-8B-Instruct"] = "apache-2.0"
    run = files.read_json(trained / "run.json")
    assert run["base_is_local"] is True
    run["arguments"]["model"], run["base_is_local"] = "Qwen/Qwen3-VL-8B-Instruct", False
    assert hub.licence_of(run, hub.check("me/x")) == "apache-2.0"
    card = str(model_card.make(run, None, {}, "me/x", False, "apache-2.0"))
    told = metadata(card.encode())
    assert (told["base_model"], told["base_model_relation"], told["license"]) == (
        "Qwen/Qwen3-VL-8B-Instruct",
        "adapter",
        "apache-2.0",
    )
    assert "Not evaluated yet" in card and "needs Qwen/Qwen3-VL-8B-Instruct" in card


@pytest.mark.parametrize("said", [{"base_is_local": True}, {}])
def test_a_base_in_a_folder_is_named_nowhere_from_wherever_it_is_pushed(trained, said, tmp_path, monkeypatch):
    """Pushed from another folder, ``outputs/st-johns-clinic`` looks like OWNER/NAME; older records do not say what it was."""
    run, name = files.read_json(trained / "run.json"), "outputs/st-johns-clinic"
    del run["base_is_local"]
    run |= {"base": name} | said
    run["arguments"]["model"] = name
    (tmp_path / "run").mkdir()
    shutil.copytree(trained / "adapter", tmp_path / "run" / "adapter")
    config = files.read_json(tmp_path / "run" / "adapter" / hub.ADAPTER) | {"base_model_name_or_path": name}
    files.write_json(tmp_path / "run" / "adapter" / hub.ADAPTER, config)
    files.write_json(tmp_path / "run" / "run.json", run)
    monkeypatch.chdir(tmp_path)
    sent = hub.sent(tmp_path / "run", merged=False)
    told = str(hub.card(tmp_path / "run", "me/x", False, None)).encode() + sent[hub.ADAPTER]
    assert b"st-johns" not in told and b"outputs/st" not in told and b"base_model:" not in told


@pytest.mark.parametrize("name", ["outputs/x", "data/x", "/a/b", "./a", "~/a", "a/b/c", "a", "models/x", "a/", "/a", "tiny"])
def test_names_that_older_records_may_have_of_a_folder_are_no_hub_ids(name):
    assert model_card.hub_base({"arguments": {"model": name}}) is None
    assert model_card.base_for_others({"arguments": {"model": name}}) == ("tiny" if name == "tiny" else "./base")


def test_a_record_knows_better_than_a_name():
    assert model_card.hub_base({"arguments": {"model": "outputs/x"}, "base_is_local": False}) == "outputs/x"
    assert model_card.hub_base({"arguments": {"model": "Qwen/x"}, "base_is_local": True}) is None
    assert model_card.hub_base({"arguments": {"model": "Qwen/x"}}) == "Qwen/x"


def as_choice_run(
    trained: Path, folder: Path, kind: str, question: str, labels: dict[str, int], task: str = "all"
) -> choice.Head:
    """A copy of a run that answers by a choice head, on a data set of ``kind``; the head."""
    head = choice.Head({question: tuple(choice.Label(name, name, token, name[0]) for name, token in labels.items())})
    shutil.copytree(trained, folder / "chosen")
    shutil.rmtree(folder / "chosen" / "eval-test")
    files.write_json(folder / "dataset.json", {"fingerprint": "toy", "source": {"kind": kind}})
    run = files.read_json(folder / "chosen" / "run.json") | {"head": head.json()}
    run["arguments"] |= {"data": str(folder), "task": task}
    files.write_json(folder / "chosen" / "run.json", run)
    return head


@pytest.mark.parametrize("merged", [False, True])
def test_a_choice_run_is_pushed_with_its_labels_and_their_tokens(server, trained, tmp_path, merged):
    head = as_choice_run(trained, tmp_path, "sheet", "Q7", {"normal": 5, "abnormal": 6}, "Q7")
    hub.push(tmp_path / "chosen", "clinic/chosen", merged)
    pushed = server.repos["clinic/chosen"]["files"]
    assert choice.from_json(json.loads(pushed["choice_head.json"])) == head
    text, told = " ".join(pushed["README.md"].decode().split()), metadata(pushed["README.md"])
    assert "| head | choice of Q7: normal, abnormal |" in text
    assert f"tuned to answer one clinical question about a fetal ultrasound image ({QUESTIONS['Q7'].title})" in text
    assert "`allowed_token_ids`" in text and "[5, 6]" in text
    assert ("inference.py --run outputs/chosen --adapter --image scan.png" in text) != merged
    assert told["pipeline_tag"] == "image-text-to-text" and "fetal-ultrasound" in told["tags"]


def test_card_of_texts_speaks_of_texts(server, trained, tmp_path):
    as_choice_run(trained, tmp_path, "csv-text", "label", {"urgent": 5, "not|urgent": 6})
    hub.push(tmp_path / "chosen", "clinic/notes")
    pushed = server.repos["clinic/notes"]["files"]
    card, told = pushed["README.md"].decode(), metadata(pushed["README.md"])
    assert told["pipeline_tag"] == "text-classification" and "text-classification" in told["tags"]
    assert not {"ultrasound", "fetal-ultrasound", "visual-question-answering"} & set(told["tags"])
    body = card.partition("## Citation")[0].replace(RESEARCH_NOTICE, "")
    assert "tuned to put labels on texts" in card and "not\\|urgent" in card
    assert not any(word in body for word in ("image first", "fetal ultrasound", "It reads pixels", "grey image"))


@pytest.mark.parametrize(("kind", "said"), [("vqa-rad", "about radiology images"), ("documents", "clinical documents")])
def test_card_of_other_images_claims_no_ultrasound(trained, kind, said):
    card = str(model_card.make(files.read_json(trained / "run.json"), None, {"source": {"kind": kind}}, "me/x", False))
    assert said in card and "fetal" not in card.partition("## Citation")[0].replace(RESEARCH_NOTICE, "")
    assert not {"ultrasound", "fetal-ultrasound"} & set(metadata(card.encode())["tags"])


def test_a_second_push_sends_weights_no_second_time(server, trained):
    hub.push(trained, "me/tuned")
    before = sum(asked.startswith("PUT") for asked in server.asked)
    hub.push(trained, "me/tuned")
    assert sum(asked.startswith("PUT") for asked in server.asked) == before
    assert len(server.repos["me/tuned"]["commits"]) == 2


def told_by(server, repo="clinic/x", token: str | None = TOKEN, monkeypatch=None, **more) -> str:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError) as mistake:
        hub.check(repo, **more)
    assert "\n" not in str(mistake.value) and (not token or token.strip() not in str(mistake.value))
    return str(mistake.value)


def test_what_cannot_work_is_told_before_training(server, monkeypatch):
    def say(*words, **more):
        return told_by(server, *words, monkeypatch=monkeypatch, **more)

    assert "HF_TOKEN is not set" in say(token=None)
    assert "401" in say(token="hf_wrong")
    assert "no HTTP header may" in say(token=f"{TOKEN}\n")
    assert "cannot write to others; me, clinic can be written to" in say("others/x")
    assert all("OWNER/NAME" in say(name) for name in ("x", "a/b/c", "a b/c", "../x", ""))
    server.repos["clinic/open"] = {"private": False, "files": {}, "commits": []}
    assert "that repository is public" in say("clinic/open")
    server.repos["clinic/whole"] = {"private": True, "files": {"config.json": b""}, "commits": []}
    assert "it holds whole weights" in say("clinic/whole")
    server.who["auth"]["accessToken"]["role"] = "read"
    assert "may only read" in say()
    scope = {"entity": {"type": "org", "name": "elsewhere"}, "permissions": ["repo.write"]}
    server.who["auth"]["accessToken"] = {"role": "fineGrained", "fineGrained": {"scoped": [scope]}}
    assert "lacks the permission repo.write" in say()
    scope["entity"]["name"] = "clinic"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert hub.check("clinic/x")
    server.broken["whoami"] = 400
    assert "400" in say()
    server.__exit__()
    assert "the hub at http" in say()


def test_a_token_that_a_proxy_sends_back_is_not_cut_in_two(monkeypatch):
    """Cut first, the rest of it would not be found."""
    from types import SimpleNamespace

    api = SimpleNamespace(token=TOKEN, endpoint="http://proxy")
    for before in range(200 - len(TOKEN) - 10, 200):
        with pytest.raises(UserError) as mistake, hub._faults("me/x", api):
            raise RuntimeError("x" * before + TOKEN)
        assert TOKEN[:4] not in str(mistake.value)


def test_upload_that_fails_is_one_line_and_can_be_repeated(server, trained):
    server.broken["/storage/"] = 403
    with pytest.raises(UserError, match="403") as mistake:
        hub.push(trained, "clinic/again")
    assert TOKEN not in str(mistake.value) and server.repos["clinic/again"]["files"] == {}
    server.broken.clear()
    hub.push(trained, "clinic/again")
    assert "adapter_model.safetensors" in server.repos["clinic/again"]["files"]


def test_pickled_weights_are_never_pushed(trained, tmp_path):
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "training_args.bin").write_bytes(b"\x80")
    assert "training_args.bin" not in hub.sent(tmp_path, merged=False)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="no safetensors"):
        hub.sent(tmp_path, merged=False)
    with pytest.raises(UserError, match="has no merged/"):
        hub.sent(tmp_path, merged=True)


def test_train_pushes_at_its_end_and_asks_for_the_token_at_its_start(server, base, data, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="HF_TOKEN is not set"):
        train.main(running.words(base, data, tmp_path, "pushed", "--push-to-hub", "me/pushed"))
    assert not (tmp_path / "pushed").exists()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    running.run(base, data, tmp_path, "pushed", "--push-to-hub", "me/pushed", "--no-merge")
    repo, weights = server.repos["me/pushed"], (tmp_path / "pushed" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert repo["private"] and repo["files"]["adapter_model.safetensors"] == weights
    assert "no scores yet" in " ".join(capsys.readouterr().out.split())
    left = [path for path in (tmp_path / "pushed").rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert left == []
    with pytest.raises(UserError, match="--public goes with"):
        train.main(running.words(base, data, tmp_path, "x", "--public"))


def test_command_line_as_a_user_types_it(server, trained):
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE",) and not k.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    words = [sys.executable, "-m", "sonovqa.hub", str(trained), "clinic/typed", "--public", "--licence", "cc-by-nc-4.0"]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "(PUBLIC)" in done.stdout and TOKEN not in done.stdout + done.stderr
    assert not server.repos["clinic/typed"]["private"]
    assert metadata(server.repos["clinic/typed"]["files"]["README.md"])["license"] == "cc-by-nc-4.0"
    env.pop("HF_TOKEN")
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and "HF_TOKEN is not set" in done.stderr
    done = subprocess.run([*words[:5], "--dry-run"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "would be pushed: README.md, adapter_config.json" in done.stdout
