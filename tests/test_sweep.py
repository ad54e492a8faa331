"""A sweep over fake commands: what is finished is not repeated, what fails stops nothing else, what is stopped goes on."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

import evaluate
from sonovqa import answering, experiments, experiments_blocks, files, tracking, tracking_mlflow
from sonovqa.cli import UserError
from sonovqa.experiments_sweep import DONE, FAILED, SKIPPED

pytestmark = pytest.mark.usefixtures("hangs_up")

BLOCK = """
for RUN in a b; do
  python train.py --data data/x --model tiny --run $RUN --seed ${SEED:-1} --no-mlp --report-to none
  python evaluate.py outputs/$RUN --data data/x ${EVAL:---adapter}
done
python evaluate.py compare outputs/a outputs/b --out outputs/a-b.json
"""


class Fake:
    """Stands in for the scripts: a training leaves run.json and an adapter, an evaluation answers and scores, a comparison its
    file; ``failing`` texts fail."""

    def __init__(self, *failing: str):
        self.failing, self.called = failing, []

    def __call__(self, command, environment) -> int:
        self.called.append(command.text)
        if any(part in command.text for part in self.failing):
            return 2
        if command.run:
            given = {"model": "tiny", "run": command.run.name, "seed": 1, "mlp": False, "data": "data/x"}
            files.write_json(command.run / "run.json", {"arguments": given})
            (command.run / "adapter").mkdir(exist_ok=True)
        elif command.evaluated:
            leave_scores(command)
        elif command.value("--out"):
            files.write_json(Path(command.value("--out")), {})
        return 0


def leave_scores(command) -> None:
    """What evaluate.py leaves of an evaluation."""
    args = evaluate.parse(list(command.words[1:]))
    folder = answering.output_folder(args)
    scores = {"overall": {"metrics": {"accuracy": {"value": 0.5}}}, "questions": {}}
    args.prompt = args.prompt or "default"
    files.write_json(folder / "scores.json", scores | answering.stamp(args))
    files.write_text(folder / "predictions.jsonl", "")


@pytest.fixture
def commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return experiments_blocks.unrolled(BLOCK)


def statuses(outcomes) -> list[str]:
    return [one.status for one in outcomes]


def test_blocks_are_unrolled_by_bash(monkeypatch, commands):
    assert [one.text.split()[1] for one in commands] == ["train.py", "evaluate.py", "train.py", "evaluate.py", "evaluate.py"]
    assert commands[4].words == ("evaluate.py", "compare", "outputs/a", "outputs/b", "--out", "outputs/a-b.json")
    monkeypatch.setenv("SEED", "7")
    assert experiments_blocks.unrolled(BLOCK)[0].value("--seed") == "7"
    assert experiments_blocks.unrolled("python x.py 'two words' \"\"")[0].words == ("x.py", "two words", "")


@pytest.mark.parametrize("block", ["rm -rf x", "python train.py $UNSET_KNOB", "for x in; python", "exit 3"])
def test_a_block_that_does_more_than_call_python_is_refused(block):
    if block == "exit 3":
        block = "echo why >&2; exit 3"
    with pytest.raises(UserError, match="fails in bash"):
        experiments_blocks.unrolled(block)


def test_finished_commands_are_not_repeated(commands):
    first, second = Fake(), Fake()
    assert statuses(experiments.perform("x", commands, first)) == [DONE] * 5
    assert statuses(experiments.perform("x", commands, second)) == [DONE] * 5 and len(first.called) == 5 and not second.called


def test_a_run_trained_anew_is_evaluated_and_compared_anew(commands):
    experiments.perform("x", commands, Fake())
    Path("outputs/b/run.json").unlink()
    again = Fake()
    experiments.perform("x", commands, again)
    assert again.called == [one.text for one in commands[2:]]


def test_an_evaluation_whose_scores_are_gone_is_made_again_and_compared_again(commands):
    experiments.perform("x", commands, Fake())
    shutil.rmtree("outputs/a/eval-test-adapter")
    again = Fake()
    assert statuses(experiments.perform("x", commands, again)) == [DONE] * 5
    assert again.called == [commands[1].text, commands[4].text]


@pytest.mark.parametrize(
    "other",
    ["--adapter --max-images 50", "--adapter --prompts simple", "--adapter --resamples 5", "--adapter --max-new-tokens 9"],
)
def test_scores_of_other_flags_in_the_same_folder_are_not_taken_for_ones_own(commands, monkeypatch, other):
    """Neither by the evaluation with these flags nor, afterwards, by the one without; each time what follows is compared anew."""
    experiments.perform("x", commands, Fake())
    monkeypatch.setenv("EVAL", other)
    for now in (experiments_blocks.unrolled(BLOCK), commands):
        fake = Fake()
        experiments.perform("x", now, fake)
        assert fake.called == [now[at].text for at in (1, 3, 4)]
    last = Fake()
    assert statuses(experiments.perform("x", commands, last)) == [DONE] * 5 and not last.called


def test_prompts_and_robustness_of_other_flags_are_measured_anew(commands):
    """Their files lie in the same place whatever the flags: prompts.json says which, the other has the time it was written."""
    experiments.perform("x", commands, Fake())
    texts = [
        "evaluate.py prompts outputs/a --data data/x --adapter",
        "-m sonovqa.robustness outputs/a --data data/x --out r.json",
    ]
    long = [experiments_blocks.Command(tuple(text.split())) for text in texts]
    short = [experiments_blocks.Command((*one.words, flag, "5")) for one, flag in zip(long, ("--max-images", "--limit"))]

    def call(command, environment) -> int:
        called.append(command)
        if command.script == "evaluate.py":
            args = evaluate.parse(list(command.words[2:]), several=True)
            files.write_json(Path("outputs/a/eval-test-adapter-prompts/prompts.json"), answering.stamp(args))
        else:
            files.write_json(Path("r.json"), {})
        return 0

    for now in (long, short, long):
        called = []
        experiments.perform("x", now, call)
        assert called == now
        experiments.perform("x", now, call)
        assert called == now, "nothing twice"


def test_a_failed_command_stops_only_what_needs_it_and_is_tried_again(commands):
    outcomes = experiments.perform("x", commands, Fake("--run a"))
    assert statuses(outcomes) == [FAILED, SKIPPED, DONE, DONE, SKIPPED]
    assert "exit status 2" in outcomes[0].why and "command 1" in outcomes[4].why
    again = Fake()
    assert statuses(experiments.perform("x", commands, again)) == [DONE] * 5 and len(again.called) == 3


def test_a_comparison_needs_evaluations_and_not_only_runs(commands):
    outcomes = experiments.perform("x", commands, Fake("evaluate.py outputs/b"))
    assert statuses(outcomes) == [DONE, DONE, DONE, FAILED, SKIPPED]


def test_a_run_of_other_arguments_is_never_taken_for_ones_own(commands, monkeypatch):
    experiments.perform("x", commands, Fake())
    monkeypatch.setenv("SEED", "2")
    outcome = experiments.perform("x", experiments_blocks.unrolled(BLOCK), Fake())[0]
    assert outcome.status == FAILED and "--seed was 1, not 2" in outcome.why
    made = files.read_json(Path("outputs/a/run.json"))
    files.write_json(Path("outputs/a/run.json"), {"arguments": made["arguments"] | {"mlp": True}})
    assert "--no-mlp was not given" in experiments.perform("x", commands, Fake())[0].why


def away(*_):
    raise ConnectionError("no route to\nhttps://somebody:secret@mlflow.example")


def test_a_tracker_that_is_away_costs_a_line_and_no_command(commands, monkeypatch, capsys):
    """After an evaluation, and where the experiment's own MLflow run is opened and closed."""
    monkeypatch.setattr(tracking, "attach", away)
    assert statuses(experiments.perform("x", commands, Fake())) == [DONE] * 5
    told = "no tracker was told of the scores of outputs/a: ConnectionError: no route to https://mlflow.example\n"
    assert told in capsys.readouterr().out
    again = Fake()
    assert statuses(experiments.perform("x", commands, again)) == [DONE] * 5 and not again.called
    tracked = experiments_blocks.unrolled(BLOCK.replace(" --report-to none", ""))
    monkeypatch.setattr(tracking_mlflow, "open_parent", away)
    assert statuses(experiments.perform("y", tracked, Fake())) == [DONE] * 5
    assert "told of experiment y: ConnectionError" in capsys.readouterr().out
    monkeypatch.setattr(tracking_mlflow, "open_parent", lambda *_: "7")
    monkeypatch.setattr(tracking_mlflow, "close_parent", away)
    assert statuses(experiments.perform("y", tracked, Fake())) == [DONE] * 5
    assert "told of the end of experiment y: ConnectionError" in capsys.readouterr().out


def test_an_unfinished_run_is_resumed(commands):
    files.write_json(Path("outputs/a/plan.json"), {})
    fake = Fake()
    experiments.perform("x", commands, fake)
    assert fake.called[0].endswith("--resume") and not fake.called[2].endswith("--resume")


def test_ctrl_c_ends_the_sweep_after_its_command_and_the_same_call_goes_on(commands):
    def stopped(command, environment):
        return 130 if command is commands[2] else Fake()(command, environment)

    with pytest.raises(KeyboardInterrupt):
        experiments.perform("x", commands, stopped)
    rest = Fake()
    assert statuses(experiments.perform("x", commands, rest)) == [DONE] * 5
    assert rest.called == [one.text for one in commands[2:]]


class Counting(Fake):
    """Notes how many commands were under way at once, and in which order they ended; the first two meet."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.begun = 0, 0, 0
        self.lock, self.two = threading.Lock(), threading.Barrier(2)

    def __call__(self, command, environment) -> int:
        with self.lock:
            self.now, self.most = self.now + 1, max(self.most, self.now + 1)
            self.begun, first = self.begun + 1, self.begun < 2
        for need in command.words[1:]:  # what it reads was made before it began
            assert not need.startswith("outputs/") or need.endswith(".json") or (Path(need) / "run.json").exists()
        if first:  # the first two, which need nothing: neither ends before the other has begun
            self.two.wait(120)
        with self.lock:
            self.now -= 1
        return super().__call__(command, environment)


def test_commands_run_side_by_side_but_after_what_they_need(commands):
    counting = Counting()
    outcomes = experiments.perform_all({"x": commands, "y": commands}, counting, jobs=4)
    assert statuses(outcomes["x"]) == statuses(outcomes["y"]) == [DONE] * 5 and counting.most > 1
    assert counting.called.count(commands[0].text) == 1, "a run that two experiments share is trained once"
    assert counting.called.index(commands[4].text) >= 4


def test_side_by_side_prints_into_files_and_says_which_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("good.py").write_text("print('fine')")
    Path("bad.py").write_text("import sys; print('why'); sys.exit(3)")
    made = [experiments_blocks.Command((name,)) for name in ("good.py", "bad.py")]
    outcomes = experiments.perform_all({"x": made}, jobs=2)["x"]
    assert statuses(outcomes) == [DONE, FAILED]
    logs = {path.name.split("-")[0]: path for path in Path("outputs/experiments/logs").iterdir()}
    assert logs["good.py"].read_text() == "fine\n" and logs["bad.py"].read_text() == "why\n"
    assert str(logs["bad.py"]) in outcomes[1].why


def test_names_are_checked_and_listed(capsys):
    assert experiments.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name}:" in listed for name in (*"012345678", "data", "1-real", "3-gpu", "4-gpu", "4-plan"))
    with pytest.raises(UserError, match="no such experiment; 99"):
        experiments.main(["99"])
    with pytest.raises(UserError, match="no experiment named"):
        experiments.main([])
    assert experiments.main(["3", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("python train.py") == 15


def test_mlflow_runs_stand_below_their_experiment_and_a_resumed_one_goes_on(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    parent = tracking_mlflow.open_parent(tmp_path, "experiment 3")
    monkeypatch.setenv("MLFLOW_PARENT_RUN_ID", parent)
    first = tracking.start("mlflow", tmp_path, "a", {"seed": 1, "resume": False})
    first.metrics({"loss": 2.0}, 1)
    resumed = tracking.start("mlflow", tmp_path, "a", {"seed": 1, "resume": True})  # the first was killed
    resumed.metrics({"loss": 1.0}, 2)
    files.write_json(tmp_path / "a" / "run.json", {})
    resumed.finish(tmp_path / "a" / "run.json")
    files.write_json(tmp_path / "a" / "eval-test" / "scores.json", {})
    tracking_mlflow.attach(
        tmp_path / "a", [tmp_path / "a" / "eval-test" / "scores.json"], {"Q7 accuracy": 0.5, "Q4 within 10 %, of mm": 0.25}
    )
    tracking_mlflow.close_parent(tmp_path, parent, "FINISHED")
    client = MlflowClient(tracking_mlflow.tracking_uri(tmp_path))
    runs = client.search_runs([client.get_experiment_by_name(tracking_mlflow.EXPERIMENT).experiment_id])
    assert len(runs) == 2 and resumed.run_id == first.run_id
    run = client.get_run(first.run_id)
    assert run.data.tags[tracking_mlflow.PARENT] == parent == tracking_mlflow.open_parent(tmp_path, "experiment 3", parent)
    assert [point.value for point in client.get_metric_history(first.run_id, "loss")] == [2.0, 1.0]
    assert run.data.metrics["Q4 within 10 percent_ of mm"] == 0.25, "MLflow takes no % and no comma"
    assert run.data.metrics["Q7 accuracy"] == 0.5 and run.info.status == "FINISHED"
    assert {item.path for item in client.list_artifacts(first.run_id)} == {"run.json", "eval-test"}
    assert tracking.start("mlflow", tmp_path, "b", {"resume": True}).run_id != first.run_id
