"""OneStepTrainer: the step inside Trainer's stock loop."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import TrainOutput

from onestep_peft import metrics as metric_names
from onestep_peft import preparation
from onestep_peft.callbacks import StepCallback, StepProgress
from onestep_peft.collation import check_lengths, collator_for
from onestep_peft.config import AUTO, OneStepConfig
from onestep_peft.held_out import select, split_rows
from onestep_peft.methods import check_directions, method_for, prompt_tuning
from onestep_peft.plan import Plan, make_plan
from onestep_peft.report import StepReport, peak_memory, reset_peak_memory, step_record
from onestep_peft.rows import Sets
from onestep_peft.saving import check_folder
from onestep_peft.saving_trainer import SavingTrainer
from onestep_peft.slices import number_of_shares, number_of_slices
from onestep_peft.step.directions import PARAMETER_DIRECTIONS, WHITENED, rule_of
from onestep_peft.step.layers import Layer, Prompt
from onestep_peft.step.line_search import affordable
from onestep_peft.step.optimizer import OneStepOptimizer
from onestep_peft.step.outcome import WALK, StepSettings
from onestep_peft.step.snapshot import Snapshot
from onestep_peft.step.statistics import observed
from onestep_peft.wrapping import config_of, described, labels_of


class OneStepTrainer(SavingTrainer):
    """A `transformers.Trainer` whose training is one step over all rows.

    The pass, the callbacks, the logs and the checkpoints are Trainer's. In place of an optimizer's many steps there
    is one: the exact gradient of all rows, directions worked out from the one pass, a search for the step size on
    held-out rows, and a guard that undoes the step where it does not help.

    Args:
        model: A model with a head for texts or tokens, or a causal language model; a PeftModel; or the name or folder
            of a base.
        args: OneStepConfig; plain TrainingArguments are taken over.
        train_dataset: Rows as the task has them (see `onestep_peft.data`), or tokenised rows.
        eval_dataset: Rows that report (before, with the fitted head, after); they never choose.
        search_dataset: Rows that choose the step and guard it, and then teach the head, too (`refit_on_held_out`).
            None: they are held out of the training rows.
        processing_class: The tokenizer; loaded with the model where that is given by name.
        data_collator: As in Trainer.
        peft_config: The adapter: a `LoraConfig` (default `LoraConfig(r=8, lora_alpha=8)`; its `target_modules` default
            to every linear layer but the head), or a `PromptTuningConfig`. With `method="full"` there is none.
        metrics: Names or `evaluate.Metric` objects; default by task.
        compute_metrics: As in Trainer, in place of `metrics`.
        model_init: As in Trainer, in place of `model`.
        text_column: The column with the text (or words, or messages), or two of them: a pair of texts, or a prompt and
            its completion; guessed where it is clear.
        label_column: The column with the labels; guessed where it is clear.
        callbacks: As in Trainer.
        preprocess_logits_for_metrics: As in Trainer, beside `compute_metrics`.
        task: "text-classification", "token-classification" or "text-generation"; default what the model's class says,
            or, for a base by name, what the columns say.

    Attributes:
        report: What the last `train` did, a `StepReport`.

    Raises:
        ValueError: Rows, labels, an adapter or arguments that one step cannot work with, before any work.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | str | os.PathLike[str] | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model_init: Callable[[], PreTrainedModel] | None = None,
        search_dataset: Any = None,
        peft_config: PeftConfig | None = None,
        metrics: Sequence[Any] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        text_column: str | Sequence[str] | None = None,
        label_column: str | None = None,
        callbacks: list[TrainerCallback] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        task: str | None = None,
    ) -> None:
        config = OneStepConfig.upcast(args)
        set_seed(config.seed)  # before the model is loaded and the adapter drawn
        check_folder(Path(config.output_dir or "."))
        if train_dataset is None:
            raise ValueError("`train_dataset` is missing: one step is worked out from the training rows.")
        if metrics is not None and compute_metrics is not None:
            raise ValueError("`metrics` and `compute_metrics` are both given. Leave one of them out.")
        resolved = metric_names.resolve([metrics] if isinstance(metrics, str) else metrics or ())
        template = model_init() if model is None and model_init is not None else model
        if isinstance(template, os.PathLike):
            template = os.fspath(template)
        if template is None:
            raise ValueError("`model` is missing: give a model, its name, or `model_init`.")
        sets = Sets(train_dataset, search_dataset, eval_dataset)
        prepared = preparation.prepare(
            template, processing_class, sets, text=text_column, label=label_column, task=task,
            max_length=config.max_length,
            virtual_tokens=prompt_tuning.virtual_tokens(config.method, peft_config, template),
        )  # fmt: skip
        self._peft_config = peft_config
        self._method = method_for(config.method, peft_config, prepared.model)
        check_directions(self._method, [name for name in config.directions if name != AUTO])
        tokenizer = prepared.processing_class or getattr(data_collator, "tokenizer", None)
        self._token_ids = {
            "pad_token_id": getattr(tokenizer, "pad_token_id", None),
            "first_token_id": preparation.first_token(prepared.sets.train, getattr(tokenizer, "cls_token_id", None)),
        }
        self.tokenise = prepared.tokenise
        self.task, self._template_config = prepared.task, config_of(cast(nn.Module, prepared.model))
        self._split = split_rows(prepared.sets.train, prepared.sets.search, config, self.task)
        self.pass_rows, self.held_rows = self._split.pass_rows, self._split.held_rows
        in_pass, outputs = select(prepared.sets.train, self.pass_rows), self._template_config.num_labels
        config.slices = number_of_slices(config, in_pass, self.task, outputs, at_once=self._method.walks_at_once)
        config.max_steps *= config.slices
        self._metric_names = [str(getattr(metric, "name", metric)) for metric in resolved]
        self._metric_names.append(getattr(compute_metrics, "__qualname__", ""))
        if compute_metrics is None:
            compute_metrics = metric_names.function_for(
                resolved, self.task, labels_of(self._template_config, self.task)
            )
            if compute_metrics is not None:
                preprocess_logits_for_metrics = self.predicted
                config.batch_eval_metrics = True
        data_collator = data_collator or collator_for(self.task, tokenizer, self._method is prompt_tuning)
        check_lengths(prepared.sets.train, self.task, data_collator, tokenizer)
        self.report = StepReport()
        self.saved_to: set[Path] = set()
        self._folds = {}
        super().__init__(
            model=self._adapt(prepared.model) if model is not None else None,
            args=config,
            data_collator=data_collator,
            train_dataset=in_pass,
            eval_dataset=prepared.sets.evaluation,
            processing_class=prepared.processing_class,
            model_init=model_init,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            callbacks=[StepCallback(self), *(callbacks or [])],
        )
        self._progress = self._replace_progress_bar()

    def _adapt(self, model: nn.Module) -> nn.Module:
        self.adapted = preparation.adapt(model, self._method, self._peft_config, **self._token_ids)
        self.task = self.adapted.task
        return self.adapted.model

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """The model that `model_init` makes, its classes named as the first one's, with the adapter on it."""
        model = super().call_model_init(trial)
        preparation.name_alike(config_of(model), self._template_config)
        return self._adapt(model)

    def _replace_progress_bar(self) -> StepProgress | None:
        if self.args.disable_tqdm:
            return None
        self.remove_callback(DEFAULT_PROGRESS_CALLBACK)
        progress = StepProgress()
        self.add_callback(progress)
        return progress

    def plan(self) -> Plan:
        """What `train` would do and cost. The model is not called, and nothing is changed or written."""
        return make_plan(
            self.bare_model,
            self._config,
            method=self._method.name,
            directions=self.directions,
            left_out=self._method.auto[len(self.directions) :] if self._config.directions == (AUTO,) else (),
            rank=self._rank,
            layers=self.layers(),
            head=self.head_layer() if self.fits_head() else None,
            rows={**self._row_counts(), "evaluation": sum(map(len, self.evaluation_sets.values()))},
            lead=self.lead_rows,
            parts=self.parts,
            by_token=self.task.by_token,
            at_once=self.walks_at_once,
        )

    # The run, from the moments that Trainer announces

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """One step (or `max_steps` of them), reported in `report`.

        An error, or an interruption, leaves every parameter with the bits that it had.

        Raises:
            ValueError: The output folder holds another run, or a row's loss is not finite.
        """
        self.check_free(Path(self._config.output_dir or "."))
        self.report = StepReport()
        self.optimizer, self._head_done, self.pass_seconds = None, False, 0.0
        self._fold_heads, self._folds, self._kept_heads, self._fitted_to = None, {}, {}, None
        self.seconds = dict.fromkeys(("total", "head", "pass", "directions", "search", "guard", "evaluation"), 0.0)
        self._before: Snapshot | None = None
        began = time.perf_counter()
        reset_peak_memory(self.args.device)
        try:
            with self.resumable():
                with contextlib.ExitStack() as self._stack:
                    output = super().train(*args, **kwargs)
                self.measure("after")
        except BaseException:
            if self._before is not None:
                self._before.restore()
            raise
        finally:
            if self._progress is not None:
                self._progress.close()
        self._fill_report(time.perf_counter() - began)
        return output

    def begin_run(self) -> None:
        """Before the first pass: the base's score, the held-out rows, the head and its score."""
        if self._head_done:  # a retry with smaller batches
            self.count_steps(self.one_step.done)
            return
        self._before = Snapshot(self.trainable())
        self.look_at_adapter()
        with self.without_idle_adapter():
            self.held_out = self.make_held_out()
        self.check_target()
        self._head_done, chosen = True, self.take_up_heads()
        if self.resume_run(self.bare_model, self.adapted.fresh):
            return
        self.one_step.bodies.check()
        self.one_step.walk.check(self.slices, self.walks_at_once)
        if self.state.global_step > 0:  # from Trainer's checkpoint, which has the head, but not those of the folds
            self.one_step.done = self.state.global_step
            self.take_up_head(chosen)
            return
        self.measure("base")
        if self.fits_head():
            with self.clock("head"), self.without_idle_adapter():
                self.fit_head()
            self.measure("head")

    def end_step(self) -> bool:
        """After a step: books its times, fits the head to the moved body; returns whether to stop here."""
        for part, seconds in self.one_step.seconds.items():
            self.seconds[part] += seconds
        steps = self.one_step.ended_steps()
        accepted = [one for one in steps if one.accepted]
        # Small steps follow a searched one that was accepted, be it before a checkpoint.
        moved = bool(accepted) or any(one.direction == WALK for one in steps)
        if (moved or (steps and self._config.walks)) and self.fits_head():
            self.follow((accepted or steps)[-1])
        ends = bool(steps) and (not moved or self.reached_target())
        if ends or not self.another_pass():
            self.finish_head()
        return ends

    # The step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The step behind torch.optim's interface, in place of AdamW."""
        if self.optimizer is None:
            config, layers = self._config, self.layers()
            settings = StepSettings(
                self.directions, config.fixed_step_size, config.damping, self._rank, config.guard,
                config.guard_confidence, self.slices, self.parts, *self.small_steps, at_once=self.walks_at_once,
            )  # fmt: skip
            head_parameters = set(self.head_layer().parameters()) if self.fits_head() else set()
            self.optimizer = OneStepOptimizer(
                self.trainable(),
                settings,
                layers=layers,
                statistics=self._stack.enter_context(observed(layers, self._whitens)),
                held_out_losses=self.held_out_losses if self.held_rows is not None else None,
                progress=self.show_point,
                body=[parameter for parameter in self.trainable() if parameter not in head_parameters],
                settle=self.settle_head if self.fits_head() else None,
            )
            self._stack.enter_context(self.optimizer.gradients.collected())
        return self.optimizer

    @property
    def _config(self) -> OneStepConfig:
        return cast(OneStepConfig, self.args)

    @property
    def parts(self) -> int:
        """Into how many parts the rows are dealt: several where the step is searched, and more passes follow."""
        config = self._config
        if config.max_steps == 1 or self.slices > 1 or config.fixed_step_size is not None or config.body_folds == 1:
            return 1
        # Parameters as they are have no gradients by part, and neither have prompts.
        plain = not PARAMETER_DIRECTIONS.keys().isdisjoint(self.directions)
        alone = not any(isinstance(layer, Layer) for layer in self.layers())
        if plain or alone or (self.fits_head() and config.head_folds == 1):
            return 1
        return int(self._all_folds(config.body_folds).max()) + 1

    @property
    def shares(self) -> int:
        """Into how many shares the rows of each part are dealt, of which one counts for the layers' covariances."""
        whitens = self._whitens and any(isinstance(layer, Layer) for layer in self.layers())
        return number_of_shares(self._config, len(self.pass_rows) // self.parts) if whitens else 1

    @property
    def adapter_rests(self) -> bool:
        """Whether the adapter is zero and no candidate needs its own gradient."""
        plain = not PARAMETER_DIRECTIONS.keys().isdisjoint(self.directions)
        return not plain and self._method.is_idle(self.bare_model)

    @property
    def _whitens(self) -> bool:
        """Whether a candidate needs covariances."""
        return not WHITENED.isdisjoint(map(rule_of, self.directions))

    @property
    def _rank(self) -> int | None:
        return self._config.rank if self._config.rank is not None else self._method.rank

    @property
    def directions(self) -> tuple[str, ...]:
        """The candidates by name."""
        if self._config.directions != (AUTO,):
            return self._config.directions
        held = len(self.held_rows) if self.held_rows is not None else 0
        return self._method.auto[: affordable(self._config.search_budget, len(self.pass_rows), held)]

    def layers(self) -> Sequence[Layer | Prompt]:
        """What moves, beside the parameters that `sgd` and `sign` move as they are."""
        if PARAMETER_DIRECTIONS.keys() >= set(self.directions):
            return []
        fitted = self.adapted.head if self.fits_head() else None
        return self._method.layers(self.bare_model, fitted)

    def settings_of_the_run(self) -> dict[str, Any]:
        """What the update and the report depend on, beside rows and model."""
        names = (
            "fit_head", "head_folds", "body_folds", "covariance_rows", "slices", "seed", "bf16",
            "activation_checkpointing", "damping", "rank", "step_size", "guard", "guard_confidence",
        )  # fmt: skip
        config = self._config
        return {
            **{name: getattr(config, name, None) for name in names},
            "method": self._method.name,
            "task": self.task.name,
            "directions": self.directions if not self.walks_at_once else WALK,
            # What a pass notes on its way depends on whether it has parts, and whether another one follows.
            "parts": (self.parts, self._config.max_steps) if self.parts > 1 else None,
            "adapter": described(self.bare_model),
            "collator": type(self.data_collator).__qualname__,
            "metrics": self._metric_names,
        }

    # The report

    def _row_counts(self) -> dict[str, int]:
        held = len(self.held_rows) if self.held_rows is not None else 0
        return {
            "gradient": len(self.pass_rows),
            "search": held if self._config.chooses else 0,
            "guard": held if self._config.guard else 0,
        }

    def _fill_report(self, seconds: float) -> None:
        self.identify()
        self.report.rows = self._row_counts()
        self.seconds["pass"] = self.pass_seconds
        self.seconds["total"] = seconds - self.seconds["evaluation"]
        self.report.seconds = {part: round(value, 3) for part, value in self.seconds.items()}
        self.report.peak_memory_bytes = peak_memory(self.args.device)
        self.report.steps = [step_record(outcome) for outcome in self.one_step.outcomes]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer, with the step size that was found in place of a learning rate."""
        if "learning_rate" in logs and self.optimizer is not None and self.one_step.done:
            logs = {key: value for key, value in logs.items() if key != "learning_rate"}
            logs["step_size"] = self.one_step.step_size
        if "grad_norm" in logs and self.optimizer is not None and self.one_step.gradient_norm is not None:
            # Trainer's is that of the adapter's parameters, which says more of how it was drawn than of the rows.
            logs = {**logs, "grad_norm": self.one_step.gradient_norm}
        super().log(logs, start_time)
