"""Saving what a run has made: a folder that is whole, or not there."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from onestep_peft.config import OneStepConfig
from onestep_peft.finishing_trainer import FinishingTrainer
from onestep_peft.report import PICTURE, StepReport
from onestep_peft.saving import check_free, portable, save_model_files, save_whole
from onestep_peft.wrapping import config_of, labels_of


class SavingTrainer(FinishingTrainer):
    """Saves a model with its head, tokenizer, report and picture."""

    saved_to: set[Path]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """An ordinary PEFT adapter (or model), its head, tokenizer, report and picture; the folder is whole or absent.

        With `push_to_hub=True` the folder is then pushed. Checkpoints that Trainer makes on the way are Trainer's own,
        without the token, and are never pushed.

        Raises:
            ValueError: The push is refused; the folder is saved.
            PushError: The push did not arrive; the folder is saved.
        """
        args = cast(OneStepConfig, self.args)
        if _internal_call:
            token, args.hub_token = args.hub_token, None
            try:
                super().save_model(output_dir, _internal_call=True)
            finally:
                args.hub_token = token
        elif args.should_save:
            folder = Path(output_dir or args.output_dir or ".")
            self.save_folder(folder)
            if args.push_to_hub:
                self.push_folder(folder)

    def save_folder(self, folder: Path) -> None:
        """Writes a whole folder, over nothing but what this trainer has saved there before."""
        self.check_free(folder)
        if self.optimizer is not None:
            self.one_step.bodies.leave()  # a callback may save in the middle of a pass
        self.report = save_whole(folder, lambda staging: self._write(staging, folder))
        self.saved_to.add(folder.resolve())

    def check_free(self, folder: Path) -> None:
        """Raises a ValueError for a folder that holds another run."""
        if folder.resolve() not in self.saved_to:
            check_free(folder)

    def identify(self) -> None:
        """Tells the report what the result belongs to; known without a run too."""
        report, config = self.report, config_of(self.bare_model)
        report.task, report.method = self.task.name, self.adapted.method.name
        report.base_model, report.base_revision = config.name_or_path, self.adapted.base_revision
        report.problem_type, report.labels = self.task.problem_type, labels_of(config, self.task)
        report.outputs = config.num_labels if self.task.has_head else 0

    def _write(self, staging: Path, folder: Path) -> StepReport:
        save_model_files(self.bare_model, staging)
        tokenizer: Any = self.processing_class
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        self.report.plot(staging / PICTURE)
        self.write_probe(self.bare_model, staging)
        self.identify()
        if not self.report.base_model:
            warnings.warn(
                "The base was built from a configuration and has no name, so the adapter cannot say what it belongs "
                "to: save the base too, and load with `base_model=`.",
                stacklevel=2,
            )
        return replace(self.report, base_model=portable(self.report.base_model, folder.resolve()))
