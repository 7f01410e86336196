"""A pass that is cut short goes on where it was: its sums are saved on the way, and found again by the next run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
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
TERMINATED = 128 + signal.SIGTERM


class ResumableTrainer(ExactGradientTrainer):
    """Saves the sums of a pass every few minutes or micro-batches, and takes them up again.

    A run with the same output folder, rows, model and settings goes on where the last state was saved and makes the
    same update as a run that nothing cut short. SIGTERM saves a state and ends the process.
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

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that a run may change."""
        raise NotImplementedError

    def settings_of_the_pass(self) -> dict[str, Any]:
        """What the sums of a pass depend on, beside rows and model; as JSON takes it."""
        raise NotImplementedError

    @contextlib.contextmanager
    def resumable(self) -> Iterator[None]:
        """While open, SIGTERM saves the pass; afterwards nothing is left of the state of a run that came to its end."""
        self._state, self._unfinished, self._terminated, self._in_pass = None, None, False, False
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
        if self._saves():
            pass_state.remove(self._folder)

    def _on_sigterm(self, *_: Any) -> None:
        self._terminated = True
        if not self._in_pass:  # outside of a pass there is nothing to save, and waiting could take long
            raise SystemExit(TERMINATED)

    @property
    def _folder(self) -> Path:
        return Path(self.args.output_dir or ".") / pass_state.FOLDER

    def _saves(self) -> bool:
        config = cast(OneStepConfig, self.args)
        # Another order would come in other micro-batches the next time.
        ordered = config.train_sampling_strategy == "sequential"
        return ordered and bool(config.save_pass_minutes or config.save_pass_batches)

    def resume_run(self, base: nn.Module, fresh: Iterable[str]) -> bool:
        """Takes up what an interrupted run has left: its parameters, scores and steps; returns whether there was any.

        Args:
            base: The model without its adapter.
            fresh: Names of its modules that no checkpoint filled: the saved state has them.
        """
        if not self._saves():
            return False
        self._digest = self._digest_of(base, fresh)
        found = None
        try:
            found = pass_state.read(self._folder, self._identity)
        except ValueError as error:
            warnings.warn(f"The unfinished pass in {self._folder} is not taken up: {error}.", stacklevel=2)
        self._state = PassState(self._identity, 0, 0, [], {}, self.seconds)
        places = processes.objects(None if found is None else (found.state.step, found.state.batches))
        if found is None or len(set(places)) > 1:
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
        self.one_step.outcomes.extend(outcome_of(record) for record in state.steps)
        # Trainer counts on from here; the second one is what its log divides the loss by.
        self.state.global_step = self._globalstep_last_logged = state.step
        self.log({"resumed_step": state.step + 1, "resumed_batch": state.batches})

    def begin_pass(self) -> None:
        """Before the first micro-batch of a step: empty sums, or those that were found."""
        super().begin_pass()
        self._batch = self._skipped = 0
        self._in_pass, self._saved_at = True, time.monotonic()
        if self._unfinished is not None:
            sums, self._skipped = self._unfinished.sums, self._unfinished.state.batches
            self._unfinished = None
            self.one_step.load_sums(sums)
            self._loss_sum = sums["loss"].to(self.args.device)
            self.pass_seconds = self.seconds["pass"]
        if self._state is not None:
            self._state.step, self._state.identity = self.state.global_step, self._identity

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As in ExactGradientTrainer; micro-batches that are in the sums already count as done."""
        self._batch += 1
        if self._batch <= self._skipped:
            self._cursor += len(inputs["labels"])
            return torch.zeros((), device=self.args.device)
        last = self.accelerator.sync_gradients
        loss = super().training_step(model, inputs, num_items_in_batch)
        if last:
            self._in_pass = False
        if self._state is not None:
            self._save_if_due(last)
        return loss

    def _save_if_due(self, last: bool) -> None:
        config = cast(OneStepConfig, self.args)
        by_number = bool(config.save_pass_batches) and self._batch % cast(int, config.save_pass_batches) == 0
        since = time.monotonic() - self._saved_at
        by_time = bool(config.save_pass_minutes) and since >= 60 * config.save_pass_minutes
        asked = processes.objects((by_number or by_time or self._terminated, self._terminated))
        # After the last one the sums are means; the state before it serves as well.
        if not last and any(save for save, _ in asked):
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
        start = {str(i): parameter for i, parameter in enumerate(self.trainable())}
        pass_state.save(self._folder, state, start, {**self.one_step.sums(), "loss": self._loss_sum})
        self._saved_at = time.monotonic()

    @property
    def _identity(self) -> str:
        return f"{self._digest}, {self._train_batch_size} rows a micro-batch"

    def _digest_of(self, base: nn.Module, fresh: Iterable[str]) -> str:
        """A hash of what has to be the same for a pass to go on, beside the size of its micro-batches."""
        digest = hashlib.blake2b(digest_size=16)
        settings = {"version": __version__, "processes": processes.number(), **self.settings_of_the_pass()}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        for rows in (self.train_dataset, self.held_rows):
            for row in listed(rows) if rows is not None else ():
                digest.update(content_key(row))
            digest.update(b";")
        restored = {id(parameter) for parameter in self.trainable()} if base is not self.model else set()
        skipped = tuple(f"{name}." for name in fresh)
        for name, parameter in base.named_parameters():
            if id(parameter) not in restored and not name.startswith(skipped):
                flat = parameter.detach().flatten()
                sample = flat[:: max(1, len(flat) // SAMPLE)].contiguous().view(torch.uint8)
                digest.update(name.encode() + sample.cpu().numpy().tobytes())
        return digest.hexdigest()
