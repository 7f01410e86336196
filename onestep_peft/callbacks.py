"""The step's moments in Trainer's loop, and a progress bar that knows what a single step is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Args

if TYPE_CHECKING:
    from onestep_peft.trainer import OneStepTrainer


class StepCallback(TrainerCallback):
    """Calls the trainer at the moments that its stock loop announces."""

    def __init__(self, trainer: OneStepTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self._trainer.begin_run()

    def on_epoch_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self._trainer.begin_epoch()

    def on_step_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self._trainer.begin_pass()

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        # Trainer's epoch is a slice, the user's a walk through all rows.
        state.epoch = state.global_step / self._trainer.slices
        if self._trainer.end_step():
            control.should_training_stop = True

    def on_epoch_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        if state.global_step % self._trainer.slices:
            control.should_evaluate = control.should_save = control.should_log = False


class StepProgress(TrainerCallback):
    """One bar over the micro-batches of a pass, then over the points of the search.

    Trainer's own bar counts optimizer steps: it would stand at 0 of 1 until all is over.
    """

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def start(self, what: str, total: int | None, unit: str) -> None:
        """Opens a bar; the one before it is closed."""
        self.close()
        self._bar = tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True)

    def advance(self, note: str = "") -> None:
        """One unit further."""
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update()

    def close(self) -> None:
        """Leaves the last bar on the screen as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_step_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self.start(f"pass {state.global_step + 1}/{state.max_steps}", args.gradient_accumulation_steps, "batch")

    def on_substep_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self.advance()

    def on_pre_optimizer_step(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self.advance()
        self.start("search", None, "point")

    def on_prediction_step(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        batches: Any = kwargs.get("eval_dataloader")
        if self._bar is None and hasattr(batches, "__len__"):
            self.start("evaluation", len(batches), "batch")
        self.advance()
        if self._bar is not None and self._bar.n == self._bar.total:
            self.close()

    def on_optimizer_step(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self.close()
