"""Scores of rows at the stages of a run, and the target that ends it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch.utils.data import DataLoader

from onestep_peft.config import OneStepConfig
from onestep_peft.errors import nearest
from onestep_peft.interruption import ResumableTrainer
from onestep_peft.preparation import Tokeniser
from onestep_peft.report import HELD_OUT, StepReport


class ScoringTrainer(ResumableTrainer):
    """Takes rows with text wherever Trainer takes tokens, and scores them on the way."""

    report: StepReport
    tokenise: Tokeniser
    held_rows: Any
    seconds: dict[str, float]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As in Trainer; rows may hold text."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self.tokenise("eval_dataset", eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As in Trainer; rows may hold text, and come without labels."""
        return super().get_test_dataloader(self.tokenise("test_dataset", test_dataset, labelled=False))

    @contextlib.contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Books the wall time of a block under a part of the run."""
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began

    def measure(self, stage: str) -> None:
        """Scores the evaluation rows at this stage of the run; where there are none, the held-out rows."""
        rows: Any = self.eval_dataset if self.eval_dataset is not None else self.held_rows
        if rows is None:
            return
        self.report.scored_on = "eval_dataset" if self.eval_dataset is not None else HELD_OUT
        with self.clock("evaluation"):
            before = self.report.metrics["head"] or self.report.metrics["base"]  # neither in a resumed run
            if stage == "after" and before and not any(outcome.accepted for outcome in self.one_step.outcomes):
                self.report.metrics["after"] = before
            elif isinstance(rows, Mapping):
                scores = [(name, self.scores(some)) for name, some in rows.items()]
                self.report.metrics[stage] = {f"{name}_{key}": v for name, one in scores for key, v in one.items()}
            else:
                self.report.metrics[stage] = self.scores(rows)

    def scores(self, rows: Any) -> dict[str, float]:
        """Loss and metrics of some rows, without Trainer's callbacks."""
        result = self.evaluation_loop(
            self.get_test_dataloader(rows), description="Evaluation", metric_key_prefix="eval"
        )
        scores = {key.removeprefix("eval_"): value for key, value in (result.metrics or {}).items()}
        return {key: value for key, value in scores.items() if key != "model_preparation_time"}

    def check_target(self) -> None:
        """Raises a ValueError, before the pass, where `stop_at` could never be compared."""
        if cast(OneStepConfig, self.args).stop_at is None:
            return
        if self.held_rows is None:
            raise ValueError("`stop_at` needs held-out rows: give a `search_dataset`, or leave `guard` on.")
        scores = self.scores(self.held_rows)
        if self._target_name not in scores:
            near = nearest(self._target_name, scores)
            raise ValueError(f"`metric_for_best_model={self._target_name!r}` is none of {sorted(scores)}.{near}")

    @property
    def _target_name(self) -> str:
        return (self.args.metric_for_best_model or "loss").removeprefix("eval_")

    def reached_target(self) -> bool:
        """Whether the held-out rows' score is as good as `stop_at` asks."""
        target = cast(OneStepConfig, self.args).stop_at
        if target is None:
            return False
        score = self.scores(self.held_rows)[self._target_name]
        greater = self.args.greater_is_better
        if greater is None:
            greater = not self._target_name.endswith("loss")
        return score >= target if greater else score <= target
