"""The trainer: TRL's SFTTrainer with this project's batches, loss, validation loss, log lines and checkpoints.

Import it after Unsloth, which patches TRL and transformers when it is imported.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
import threading
import time
import warnings
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from sonovqa import devices, files, losses, records, resuming, training_flags
from sonovqa.cli import console
from sonovqa.sampling import Draws, Sequences

LOGGED = ("loss", "eval_loss", "learning_rate", "grad_norm", "step_seconds", "data_wait_seconds")
PROGRESS = "progress.json"  # in a checkpoint: the curve so far, the seconds it took, whether the training had ended


def configure(args, folder: Path, validate: bool, steps: int) -> SFTConfig:
    """TRL's configuration from train.py's arguments.

    Args:
        args: the arguments, all filled in.
        folder: where checkpoints go.
        validate: whether there is a validation split; its loss chooses the best checkpoint, see `training_flags.keeps_best`.
        steps: optimiser steps.
    """
    cuda, dtype = torch.cuda.is_available(), devices.compute_dtype()
    workers = args.workers if args.workers is not None else (4 if cuda else 0)
    config = SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch,  # of twice as many rows, 8B's validation took more memory than its training
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.lr,
        lr_scheduler_type=args.schedule,
        warmup_steps=args.warmup,
        optim=args.optimizer,
        weight_decay=args.weight_decay,
        seed=args.seed,
        data_seed=args.seed,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        gradient_checkpointing=args.checkpointing and cuda,
        logging_steps=args.log_every,
        disable_tqdm=True,
        report_to="none",  # `tracking` does it
        eval_strategy="steps" if validate else "no",
        eval_steps=args.eval_every,
        save_strategy="no" if args.dry_run else "steps",
        save_steps=args.eval_every,
        restore_callback_states_from_checkpoint=True,
        load_best_model_at_end=validate and training_flags.keeps_best(args),
        metric_for_best_model="eval_loss" if validate and training_flags.keeps_best(args) else None,
        dataloader_num_workers=workers,
        remove_unused_columns=False,
        max_length=None,  # else TRL cuts image tokens
        dataset_kwargs={"skip_prepare_dataset": True},
        use_cpu=not cuda,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # all are constants, such as rotary frequencies; no family has batch norms' averages
    )
    return _prepared_for_ddp(devices.one_gpu(config))


def _prepared_for_ddp(config: SFTConfig) -> SFTConfig:
    if devices.processes() == 1:
        return config
    devices.keep_blocks_whole()
    # torch 2.13 has a new name for `ddp_broadcast_buffers`, accelerate 1.15 still uses the old one.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    if config.device.type == "cpu":
        config._setup_devices = torch.device("cpu")  # with accelerate's "cpu:0" torch.load cannot read a checkpoint
    return config


class SharedImageTrainer(SFTTrainer):
    """An SFTTrainer whose loss is the weighted mean over all supervised tokens of an optimiser step, whatever rows they stand in.

    So shared and separate batching, and one or several processes or accumulation steps, give the same loss
    (`tests/test_train.py`). Rows come from a plan (`planning.Plan.items`), batches from `batching.Collator`.

    Args:
        gamma: of focal loss in training, 0 for none; the validation loss is never focal.
        mass: with class weights, `planning.Plan.mass`: a step's loss is then divided by what its sequences weigh on average and
            not by what they weigh, or a step without the rare class would give its common answers a weight they should not
            have; ``None``: by what they weigh, as separate samples.

    Logged with each loss: ``step_seconds`` of the steps since the last log line, validation and saving left out, and what of
    it the training waited for the next batches, ``data_wait_seconds``.
    """

    def __init__(self, model, *args, gamma: float = 0.0, mass: float | None = None, **kwargs):
        trained = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(model, *args, **kwargs)
        for parameter, data in trained:
            # TRL puts LoRA matrices on a quantised base into bf16, where AdamW's small updates are lost and which the scaling of
            # fp16 does not take; a resumed run, whose matrices PEFT loads in fp32, would be another one. (Unsloth takes that
            # out of TRL.)
            if data.dtype == torch.float32 != parameter.dtype:
                parameter.data = data.to(parameter.device)
        # TRL takes nothing but a `datasets.Dataset`.
        self.train_dataset = Sequences(self.train_dataset)
        self.eval_dataset = self.eval_dataset and Sequences(self.eval_dataset)
        self.model_accepts_loss_kwargs = True  # else the trainer divides by the accumulation steps a second time
        self._gamma, self._mass = gamma, mass
        self._began = time.perf_counter()
        self._spent = {"step_seconds": 0.0, "data_wait_seconds": 0.0}

    def _get_train_sampler(self, train_dataset=None):
        self._order = self._draws(train_dataset or self.train_dataset, self.args.train_batch_size, self.args.data_seed)
        return self._order

    def _get_eval_sampler(self, eval_dataset):
        return self._draws(eval_dataset, self.args.eval_batch_size, None)

    def _draws(self, sequences: Sequences, batch: int, seed: int | None) -> Draws:
        processes = self.accelerator.num_processes
        return Draws(len(sequences), seed, together=batch * processes if processes > 1 else 1)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimiser step, and what their loss is divided by: their weights over all processes."""
        self._began = time.perf_counter()
        batches = list(itertools.islice(epoch_iterator, num_batches))
        self._spent["data_wait_seconds"] += time.perf_counter() - self._began
        total = losses.divisor([batch["weights"] for batch in batches], self._mass)
        weight = self.accelerator.reduce(total.to(device), "sum")
        # Question weights of 0 can leave a step without any: its loss is then 0, not 0 / 0, which would end in NaN weights.
        return batches, weight.clamp_min(torch.finfo(weight.dtype).tiny)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Weighted negative log-likelihood over ``num_items_in_batch``; gradients average over processes, hence the factor."""
        inner = self.accelerator.unwrap_model(model)
        logits, targets, weights = losses.answer_logits(inner, inputs, wrapped=model)
        if self._gamma:
            total = losses.focal_sum(logits, targets, weights, losses.answer_of_token(inputs), self._gamma)
        else:
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

    def _run_epoch(self, *args, epoch: int, **kwargs):
        """A pass over the data; none for a run that goes on from its last step, where the trainer would take one more."""
        self._order.set_epoch(epoch)  # accelerate does not reach it in the pass that several processes resume in
        if not self.control.should_training_stop:
            super()._run_epoch(*args, epoch=epoch, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """The step ends before logging, validation and saving begin."""
        if self.control.should_log and torch.cuda.is_available():
            torch.cuda.synchronize()  # its kernels are only queued; logging would wait for them
        self._spent["step_seconds"] += time.perf_counter() - self._began
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._began = time.perf_counter()  # it is called once more after a pass

    def log(self, logs, *args, **kwargs):
        """Add the seconds spent since the last loss was logged."""
        if "loss" in logs:
            logs = logs | self._spent
            self._spent = dict.fromkeys(self._spent, 0.0)
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        """A checkpoint, complete from all processes when this returns. A full disk is an ``OSError``, whoever met it."""
        try:
            super()._save_checkpoint(model, trial)
        except Exception as fault:  # torch, safetensors and Python each have their own for it
            if "No space left" in str(fault) or "os error 28" in str(fault) or "file write failed" in str(fault):
                raise OSError(errno.ENOSPC, "No space left on device", self.args.output_dir) from fault
            raise
        self.accelerator.wait_for_everyone()

    def create_model_card(self, *args, **kwargs):
        """No card from TRL: it would not say what this run's record says."""


def time_steps(trainer: SFTTrainer, accumulate: int, timed: int) -> float:
    """Seconds of an optimiser step, over the last ``timed`` ones of a short training: the first one compiles."""
    marks = []
    step = trainer.training_step
    trainer.training_step = lambda *a, **k: (marks.append(time.perf_counter()), step(*a, **k))[1]
    trainer.train()
    marks.append(time.perf_counter())
    return (marks[-1] - marks[accumulate]) / timed


class Progressing(TrainerCallback):
    """A progress bar with the time left, and one line a log step: loss, samples and tokens a second, peak memory.

    Curve and time are kept with every checkpoint, so that a resumed run's record tells of all its steps. The first Ctrl-C
    ends the training after the step at hand with a checkpoint, the second at once.

    Args:
        questions, tokens: of one pass over the training split.
        tracker: a `tracking.Tracker` or ``None``.

    Attributes:
        curve: what was logged, ``{step, loss, …}`` each; a ``loss`` is the mean over the steps since the one before.
        resumed_at: the steps at which the run went on after an interruption.
        stopped: whether Ctrl-C ended the training.
    """

    def __init__(self, questions: int, tokens: int, tracker=None):
        self.per_pass, self.tracker = (questions, tokens), tracker
        self.curve: list[dict] = []
        self.resumed_at: list[int] = []
        self.stopped = False
        self._bar = self._task = self._started = self._interrupt = self._process = None
        self._before = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before an interruption included."""
        return self._before + (time.perf_counter() - self._started)

    def on_train_begin(self, args, state, control, **_):
        """Open the bar; a resumed run goes on where it stopped."""
        self._started = time.perf_counter()
        if state.global_step:
            self._restore(Path(args.output_dir), state, control)
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not state.is_world_process_zero)
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step)
        self._bar.start()
        if args.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._process, self._interrupt = os.getpid(), signal.signal(signal.SIGINT, self._stop_soon)

    def on_step_end(self, args, state, control, **_):
        """Move the bar. Steps since the last log line are logged before a checkpoint, which does not hold them."""
        self._bar.update(self._task, completed=state.global_step)
        if self.stopped:
            control.should_training_stop = control.should_save = True
        if control.should_save:
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **_):
        """Print, keep and track what was logged."""
        if not logs or not state.is_world_process_zero or "train_runtime" in logs:
            return
        passes, seconds = state.epoch or 0.0, self.seconds
        known = {k: v for k, v in logs.items() if k in LOGGED}
        rates = {
            "samples_per_second": passes * self.per_pass[0] / seconds,
            "tokens_per_second": passes * self.per_pass[1] / seconds,
        }
        if "loss" in known:
            known |= rates | {"peak_memory_bytes": records.peak_memory()}
            self._say(
                f"step {state.global_step:>5}  loss {known['loss']:.4f}  {rates['samples_per_second']:.1f} answers/s  "
                f"{rates['tokens_per_second']:.0f} tokens/s  peak {records.gigabytes(known['peak_memory_bytes'])}"
            )
        elif "eval_loss" in known:
            self._say(f"step {state.global_step:>5}  validation loss {known['eval_loss']:.4f}")
        self.curve.append({"step": state.global_step, **known})
        if self.tracker:
            self.tracker.metrics(known, state.global_step)

    def on_save(self, args, state, control, **_):
        """Finish a checkpoint: curve and time, the mark that it is whole; only then older ones go."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        checkpoint = folder / f"checkpoint-{state.global_step}"
        ended = state.global_step >= state.max_steps or (control.should_training_stop and not self.stopped)
        kept = {"seconds": self.seconds, "ended": ended, "resumed_at": self.resumed_at, "curve": self.curve}
        files.write_json(checkpoint / PROGRESS, kept)
        resuming.mark_whole(checkpoint)
        resuming.prune(folder, state.best_global_step)

    def on_train_end(self, args, state, control, **_):
        """Close the bar."""
        if self._interrupt:
            signal.signal(signal.SIGINT, self._interrupt)
        if self._bar:
            self._bar.stop()

    def _restore(self, folder: Path, state, control) -> None:
        kept = files.read_json(folder / f"checkpoint-{state.global_step}" / PROGRESS)
        self._before, self.curve, self.resumed_at = kept["seconds"], kept["curve"], [*kept["resumed_at"], state.global_step]
        control.should_training_stop = kept["ended"]
        if state.best_global_step:  # the folder may have been moved since
            state.best_model_checkpoint = str(folder / f"checkpoint-{state.best_global_step}")

    def _stop_soon(self, number, frame) -> None:
        if os.getpid() != self._process:  # a data worker: it was forked with this handler and is stopped by its parent
            return
        signal.signal(signal.SIGINT, self._interrupt)
        self.stopped = True
        self._say("stopping after this step, with a checkpoint; Ctrl-C again stops at once")

    def _say(self, line: str) -> None:
        (self._bar.console if self._bar else console).print(line)
