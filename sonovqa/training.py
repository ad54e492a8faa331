"""The trainer: TRL's SFTTrainer with this project's batches, loss, validation loss, log lines and checkpoints.

Import it after Unsloth, which patches TRL and transformers when it is imported.
"""

from __future__ import annotations

import itertools
import shutil
import time
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTTrainer

from sonovqa import files, losses, records
from sonovqa.cli import console

WHOLE = "checkpoint_is_whole"  # written last into a checkpoint: a folder without it was cut off while being written


class SharedImageTrainer(SFTTrainer):
    """An SFTTrainer whose loss is the mean over all supervised tokens of an optimiser step, whatever rows they stand in.

    So shared and separate batching, and one or several processes or accumulation steps, give the same loss
    (`tests/test_train.py`). Rows come from a plan (`planning.Plan.items`), batches from `batching.Collator`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # else the trainer divides by the accumulation steps a second time

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimiser step, and the sum of their loss weights over all processes."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        total = sum((batch["weights"].sum() for batch in batches), torch.zeros(()))
        return batches, self.accelerator.reduce(total.to(device), "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Weighted negative log-likelihood over ``num_items_in_batch``; gradients average over processes, hence the factor."""
        inner = self.accelerator.unwrap_model(model)
        logits, targets, weights = losses.answer_logits(inner, inputs, wrapped=model)
        total = losses.weighted_sum(logits, targets, weights)
        if num_items_in_batch is None:
            return total / weights.sum()
        return total * self.accelerator.num_processes / num_items_in_batch

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Validation loss, the exact mean over all supervised tokens of the split."""
        self.model.eval()
        started, sums = time.perf_counter(), torch.zeros(2, device=self.args.device, dtype=torch.float64)
        for batch in self.get_eval_dataloader(eval_dataset):
            logits, targets, weights = losses.answer_logits(self.model, self._prepare_inputs(batch))
            sums += torch.stack([losses.weighted_sum(logits, targets, weights), weights.sum()]).double()
        self.model.train()
        total, weight = self.accelerator.reduce(sums, "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": total / weight, f"{metric_key_prefix}_runtime": time.perf_counter() - started}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *args, **kwargs):
        """No card from TRL: it would not say what this run's record says."""


class Progressing(TrainerCallback):
    """A progress bar with the time left, and one line a log step: loss, samples and tokens a second, peak memory.

    Args:
        questions, tokens: of one pass over the training split.
        tracking: a `records.Tracking` or ``None``.
    """

    def __init__(self, questions: int, tokens: int, tracking=None):
        self.per_pass, self.tracking = (questions, tokens), tracking
        self.curve: list[dict] = []
        self._bar = self._task = self._started = None
        self._passes = 0.0

    def on_train_begin(self, args, state, control, **_):
        """Open the bar; a resumed run starts where it stopped."""
        self._started, self._passes = time.perf_counter(), state.epoch or 0.0
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not state.is_world_process_zero)
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_step_end(self, args, state, control, **_):
        """Move the bar."""
        self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **_):
        """Print, keep and track what was logged."""
        if not logs or not state.is_world_process_zero or "train_runtime" in logs:
            return
        passes = (state.epoch or 0.0) - self._passes
        seconds = time.perf_counter() - self._started
        known = {k: v for k, v in logs.items() if k in ("loss", "eval_loss", "learning_rate", "grad_norm")}
        rates = {"samples_per_second": passes * self.per_pass[0] / seconds, "tokens_per_second": passes * self.per_pass[1] / seconds}
        if "loss" in known:
            known |= rates | {"peak_memory_bytes": records.peak_memory()}
            self._say(f"step {state.global_step:>5}  loss {known['loss']:.4f}  {rates['samples_per_second']:.1f} answers/s  "
                      f"{rates['tokens_per_second']:.0f} tokens/s  peak {records.gigabytes(known['peak_memory_bytes'])}")  # fmt: skip
        elif "eval_loss" in known:
            self._say(f"step {state.global_step:>5}  validation loss {known['eval_loss']:.4f}")
        self.curve.append({"step": state.global_step, **known})
        if self.tracking:
            self.tracking.metrics(known, state.global_step)

    def on_train_end(self, args, state, control, **_):
        """Close the bar."""
        if self._bar:
            self._bar.stop()

    def _say(self, line: str) -> None:
        (self._bar.console if self._bar else console).print(line)


class WholeCheckpoints(TrainerCallback):
    """Marks a checkpoint as whole once all of its files are on disk."""

    def on_save(self, args, state, control, **_):
        """Called by the trainer after everything of the checkpoint was written."""
        if state.is_world_process_zero:
            files.write_text(Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE, f"{state.global_step}\n")


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint under ``folder``; those cut off while being written are removed."""
    for path in folder.glob("checkpoint-*"):
        if not (path / WHOLE).exists():
            shutil.rmtree(path)
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None
