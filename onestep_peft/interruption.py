"""A pass that is cut short goes on where it was: its sums are saved on the way, and found again by the next run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from onestep_peft import pass_state
from onestep_peft.config import OneStepConfig
from onestep_peft.gradient import ExactGradientTrainer
from onestep_peft.held_out import content_key, listed
from onestep_peft.pass_state import PassState, Unfinished
from onestep_peft.report import StepReport, outcome_of, step_record
from onestep_peft.step import processes
from onestep_peft.version import __version__

# So many entries of every parameter stand for all of it where two models are compared.
SAMPLE = 4096
# What the report knows before the pass.
REPORTED = ("metrics", "class_recall", "class_counts", "scored_on")
# Several processes agree on a save every so many micro-batches.
AGREED_EVERY = 16
# The last micro-batch's sums are saved after this share of the usual time.
LAST_SHARE = 0.2
TERMINATED = 128 + signal.SIGTERM


class ResumableTrainer(ExactGradientTrainer):
    """Saves the sums of a pass every few minutes or micro-batches, and takes them up again.

    A run with the same output folder, rows, model and settings goes on where the last state was saved and makes the
    same update as a run that nothing cut short. SIGTERM in the pass saves a state and ends the process.
    """

    report: StepReport
    held_rows: Any
    seconds: dict[str, float]
    _state: PassState | None = None
    _unfinished: Unfinished | None = None
    _digest = ""
    _batch = 0
    _skipped = 0
    _terminated = False
    _in_pass = False
    _saved_at = 0.0

    @property
    def evaluation_sets(self) -> dict[str, Any]:
        """The evaluation rows by their set's name; a lone set has an empty one."""
        sets = self.eval_dataset
        if sets is None:
            return {}
        return dict(sets) if isinstance(sets, Mapping) else {"": sets}

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that a run may change."""
        raise NotImplementedError

    def settings_of_the_run(self) -> dict[str, Any]:
        """What the update and the report depend on, beside rows and model; as JSON takes it."""
        raise NotImplementedError

    def fixed_in_the_pass(self) -> dict[str, Tensor]:
        """What was worked out before the pass and is neither a parameter nor a sum, by name."""
        return {}

    def take_up_fixed(self, named: Mapping[str, Tensor]) -> None:
        """Takes over what `fixed_in_the_pass` returned, from among other tensors."""

    @contextlib.contextmanager
    def resumable(self) -> Iterator[None]:
        """While open, SIGTERM saves the pass; afterwards nothing is left of the state of a run that came to its end."""
        self._state, self._unfinished, self._terminated, self._in_pass = None, None, False, False
        self._saved_at = 0.0
        handles = self._saves() and threading.current_thread() is threading.main_thread()
        # A handler that somebody else has set (a cluster's, Trainer's own) keeps its say.
        handles = handles and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if handles:
            signal.signal(signal.SIGTERM, self._on_sigterm)
        try:
            yield
        finally:
            if handles:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._state is not None:
            pass_state.remove(self._folder)

    def _on_sigterm(self, *_: Any) -> None:
        self._terminated = True
        if not self._in_pass or self._state is None:  # nothing to save, and waiting could take long
            raise SystemExit(TERMINATED)

    @property
    def _folder(self) -> Path:
        """Where this run's state is: runs that differ have different ones."""
        batch = f"{self._digest}, {self._train_batch_size} rows a micro-batch"
        identity = hashlib.blake2b(batch.encode(), digest_size=8).hexdigest()
        return Path(self.args.output_dir or ".") / pass_state.FOLDER / identity

    def _saves(self) -> bool:
        config = cast(OneStepConfig, self.args)
        # Another order would come in other micro-batches the next time.
        ordered = config.train_sampling_strategy == "sequential"
        return ordered and bool(config.save_pass_minutes or config.save_pass_batches)

    def resume_run(self, model: nn.Module, fresh: Sequence[str]) -> bool:
        """Takes up what an interrupted run has left: its parameters, scores and steps; returns whether there was any.

        Args:
            fresh: Names of modules that no checkpoint filled: the saved state has them.
        """
        if not self._saves():
            return False
        self._digest = self._digest_of(model, fresh)
        self._state, found = PassState(0, 0, [], {}, self.seconds), None
        try:
            found = pass_state.read(self._folder)
        except ValueError as error:
            warnings.warn(f"The unfinished pass in {self._folder} is not taken up: {error}.", stacklevel=2)
        places = processes.objects(None if found is None else (found.state.step, found.state.batches))
        if found is None or len(set(places)) > 1 or found.state.step >= self.state.max_steps:
            if others := pass_state.others(self._folder):
                warnings.warn(
                    f"{self._folder.parent} holds an unfinished pass ({', '.join(others)}) of other rows, another "
                    "model or other settings. It stays; delete it when nothing is to go on there.",
                    stacklevel=2,
                )
            return False
        self._unfinished, self._state = found, found.state
        self._take_up(found)
        return True

    @torch.no_grad()
    def _take_up(self, found: Unfinished) -> None:
        for parameter, value in zip(self.trainable(), found.start, strict=True):
            parameter.copy_(value)
        state = found.state
        for name, value in state.report.items():
            setattr(self.report, name, value)
        self.seconds.update(state.seconds)
        for record in state.steps:
            self.one_step.outcomes.append(outcome_of(record))
            self.one_step.go_on_from(self.one_step.outcomes[-1])
        self.one_step.done = state.step
        self.count_steps(state.step)
        self.log({"resumed_step": state.step + 1, "resumed_batch": state.batches})

    def count_steps(self, done: int) -> None:
        """Lets Trainer count on from so many steps.

        The second field, private in transformers 5, is what its log divides the loss by.
        """
        self.state.global_step = self._globalstep_last_logged = done

    def begin_pass(self) -> None:
        """Before the first micro-batch of a step: empty sums, or those that were found."""
        super().begin_pass()
        self._batch = self._skipped = 0
        self._in_pass = True
        if not self._saved_at or self.state.global_step % self.slices == 0:  # a walk's slices may be short: all count
            self._saved_at = time.monotonic()
        if self._unfinished is not None:
            sums, self._skipped = self._unfinished.sums, self._unfinished.state.batches
            self._unfinished = None
            self.one_step.load_sums(sums)
            self._loss_sum = sums["loss"].to(self.args.device)
            self.take_up_fixed(sums)
            self.pass_seconds = self.seconds["pass"]
        if self._state is not None:
            self._state.step = self.state.global_step

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As in ExactGradientTrainer; micro-batches that are in the sums already count as done."""
        self._batch += 1
        if self._batch > self._skipped:
            return super().training_step(model, inputs, num_items_in_batch)
        self._cursor += len(inputs["labels"])
        return self.end_micro_batch()

    def end_micro_batch(self) -> Tensor:
        """As in ExactGradientTrainer, and before the sums become means they are saved where it is time."""
        if self._batch > self._skipped and self._state is not None:
            self._save_if_due()
        if self.accelerator.sync_gradients:
            self._in_pass = False
        return super().end_micro_batch()

    def _save_if_due(self) -> None:
        config = cast(OneStepConfig, self.args)
        last = self.accelerator.sync_gradients
        # Several processes have to agree, and to ask for it at every micro-batch would make them wait.
        if processes.number() > 1 and not config.save_pass_batches and not last and self._batch % AGREED_EVERY:
            return
        by_number = bool(config.save_pass_batches) and self._batch % cast(int, config.save_pass_batches) == 0
        # At its end a pass is saved earlier: the search comes, and it may take long.
        minutes = config.save_pass_minutes * (LAST_SHARE if last else 1)
        by_time = bool(minutes) and time.monotonic() - self._saved_at >= 60 * minutes
        asked = processes.objects((by_number or by_time or self._terminated, self._terminated))
        if any(save for save, _ in asked):
            self._save_pass()
        if any(terminated for _, terminated in asked):
            raise SystemExit(TERMINATED)

    def _save_pass(self) -> None:
        assert self._state is not None
        state, self._state.batches = self._state, self._batch
        state.steps = [step_record(outcome) for outcome in self.one_step.outcomes]
        state.report = {name: getattr(self.report, name) for name in REPORTED}
        state.seconds = {**self.seconds, "pass": self.pass_seconds + time.perf_counter() - self._pass_began}
        # Until the step moves them, the parameters are what they were at its start.
        own = self.one_step.bodies.own
        start = {str(i): own(parameter) for i, parameter in enumerate(self.trainable())}
        try:
            sums = {**self.one_step.sums(), "loss": self._loss_sum, **self.fixed_in_the_pass()}
            pass_state.save(self._folder, state, start, sums)
        except OSError as error:
            warnings.warn(f"The pass goes on, but cannot be saved to {self._folder}: {error}", stacklevel=2)
            self._state = None
        self._saved_at = time.monotonic()

    def _digest_of(self, model: nn.Module, fresh: Sequence[str]) -> str:
        """A hash of what has to be the same for a pass to go on, beside the size of its micro-batches."""
        digest = hashlib.blake2b(digest_size=16)
        settings = {
            "version": __version__,
            "processes": processes.number(),
            "step": self.state.global_step,  # of a Trainer's checkpoint
            **self.settings_of_the_run(),
        }
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        for rows in (self.train_dataset, self.held_rows, *self.evaluation_sets.values()):
            for row in listed(rows) if rows is not None else ():
                digest.update(content_key(row))
            digest.update(b";")
        for name, parameter in model.named_parameters():
            about = f"{name} {tuple(parameter.shape)} {parameter.dtype};"
            if not any(f".{part}." in f".{name}" for part in fresh):
                flat = parameter.detach().flatten()
                sample = flat[:: max(1, len(flat) // SAMPLE)].contiguous().view(torch.uint8)
                digest.update(sample.cpu().numpy().tobytes())
            digest.update(about.encode())
        return digest.hexdigest()
