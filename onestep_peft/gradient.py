"""The exact gradient of all rows, inside Trainer's stock loop."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from onestep_peft.batch_sizes import ROWS_ON_A_CPU, USUAL, rows_for_a_gpu
from onestep_peft.config import AUTO, OneStepConfig
from onestep_peft.held_out import listed, padded
from onestep_peft.methods import Method
from onestep_peft.out_of_fold import Pulling
from onestep_peft.rows import Tokeniser
from onestep_peft.slices import PartedRows, SlicedRows, of_small_steps, rows_of_the_lead
from onestep_peft.step import processes
from onestep_peft.step.optimizer import OneStepOptimizer
from onestep_peft.tasks import Task, logits_for

SHOWN_ROWS = 10
# Parts of a pass are filled up to full micro-batches: with so many each that is a small share.
PARTS_IN_BATCHES = 8


class ExactGradientTrainer(Trainer):
    """A Trainer whose every optimizer step sees the gradient of the mean loss over all rows, or all of a slice of them.

    Micro-batches add up *sums* of losses; after the last one everything is divided once by the number of items. So
    batch sizes, uneven tails and rows without labels change nothing.
    """

    # `compute_loss` returns sums; nothing is left for Trainer to scale.
    loss_is_scaled_for_ga = True

    task: Task
    tokenise: Tokeniser
    pass_rows: list[int]
    pass_seconds = 0.0
    _method: Method
    _aside: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    _cursor = 0
    _loss_sum = torch.zeros(())
    _sliced: SlicedRows | None = None
    _bare: tuple[nn.Module, nn.Module] | None = None
    _template_config: Any
    _pass_began = 0.0

    @property
    def slices(self) -> int:
        """How many steps a walk through the rows makes."""
        return int(cast(OneStepConfig, self.args).slices)

    @property
    def bare_model(self) -> nn.Module:
        """The model out of accelerate's wrapping."""
        model = cast(nn.Module, self.model)
        if self._bare is None or self._bare[0] is not model:  # accelerate goes through all modules each time
            self._bare = model, self.accelerator.unwrap_model(model)
        return self._bare[1]

    @property
    def walks_at_once(self) -> bool:
        """Whether small steps are all that there is: so a prompt walks once, where nothing is said of its direction."""
        config = cast(OneStepConfig, self.args)
        alone = self._method.walks_at_once and config.directions == (AUTO,)
        return alone and config.walks and config.max_steps == self.slices

    @property
    def leads(self) -> bool:
        """Whether the first slice of a walk makes a step that is searched."""
        return cast(OneStepConfig, self.args).walks and not self.walks_at_once

    @cached_property
    def lead_rows(self) -> int:
        """How many rows that slice has; all of them where there is none."""
        rows: Any = self.train_dataset
        if not self.leads:
            return len(rows)
        return rows_of_the_lead(rows, self.slices, self.task, self._template_config.num_labels)

    @property
    def small_steps(self) -> tuple[float, float]:
        """What `of_small_steps` says of the other slices."""
        return of_small_steps(len(self.pass_rows) - self.lead_rows, self.slices, self.task)

    @property
    def parts(self) -> int:
        """Into how many parts the rows of a pass are dealt, each with a body of its own."""
        return 1

    @property
    def one_step(self) -> OneStepOptimizer:
        """The step's optimizer, out of accelerate's wrapping."""
        optimizer: Any = self.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    @property
    def shares(self) -> int:
        """Into how many shares the rows of each part are dealt, of which one counts for the layers' covariances."""
        return 1

    def forget_cursor(self) -> None:
        """Counts rows from the first one again."""
        self._cursor = 0

    def begin_epoch(self) -> None:
        """Before Trainer reads the rows of a step."""
        if self._sliced is not None:
            self._sliced.current = self.state.global_step % self.slices
            if self.slices > 1:  # slices are not all as long
                per_process = self._train_batch_size * processes.number()
                self.args.gradient_accumulation_steps = -(-len(self._sliced) // per_process)

    def begin_pass(self) -> None:
        """Before the first micro-batch of a step."""
        self.one_step.begin_pass()
        self.one_step.goes_on = self.parts > 1 and self.state.global_step + 1 < self.state.max_steps
        self.look_at_adapter()
        self.forget_cursor()
        self._loss_sum = torch.zeros((), device=self.args.device)
        self._pass_began = time.perf_counter()

    def get_train_dataloader(self) -> DataLoader:
        """As in Trainer; several processes get as many full micro-batches each, the last rows without labels."""
        rows: Any = self.train_dataset
        self._sliced = None
        lead = self.lead_rows if self.leads else 0
        self._train_batch_size = self._rows_at_a_time(rows, -(-(len(rows) - lead) // (self.slices - (lead > 0))))
        if self.slices > 1:
            self._sliced = SlicedRows(rows, self.slices, self._train_batch_size, lead)
        elif self.parts * self.shares > 1:
            self._sliced = PartedRows(rows, self.parts, self.shares, self._train_batch_size)
        self.train_dataset = self._sliced or padded(rows, self._train_batch_size)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = rows

    def _rows_at_a_time(self, rows: Any, slice_rows: int) -> int:
        """The rows of a micro-batch: sizes never tell in what comes of it.

        Args:
            rows: The longest first.
            slice_rows: How many of them a slice has.
        """
        usual, most = self._train_batch_size, -(-slice_rows // processes.number())
        if self.walks_at_once:  # where there are several processes most of a larger one would only fill it up
            return min(usual, most)
        if self.parts * self.shares > 1:  # each of them is filled up
            most //= PARTS_IN_BATCHES * self.parts * self.shares
        # Where Trainer has gone down to fewer, more did not fit into memory; and who wants the pass saved every so many
        # micro-batches counts on their size.
        free = usual == self.args.train_batch_size and not cast(OneStepConfig, self.args).save_pass_batches
        if free and (self.slices > 1 or processes.number() == 1):
            usual = self._grown("per_device_train_batch_size", len(rows[0].get("input_ids", ())), most)
        return usual if self.slices == 1 or self.on_gpu else min(usual, ROWS_ON_A_CPU)

    def _grown(self, name: str, tokens: int, most: int) -> int:
        """A batch size, and where nobody has set it as many more rows as a GPU can take at a time.

        Args:
            name: Its name.
            tokens: Of the longest row; 0 where nobody knows.
            most: So many rows at most, unless it is more.
        """
        usual, config = getattr(self.args, name), cast(OneStepConfig, self.args)
        free = name in config.batches_may_grow and usual == USUAL[name]
        # A language model's logits may be many.
        if not (free and tokens and self.on_gpu and self.task.has_head):
            return usual
        parameters = sum(parameter.numel() for parameter in self.bare_model.parameters())
        return max(usual, min(most, rows_for_a_gpu(tokens, parameters)))

    @property
    def on_gpu(self) -> bool:
        """Whether a device waits for what Python asks of it."""
        return self.args.device.type != "cpu"

    @contextlib.contextmanager
    def larger_forwards(self, sets: Sequence[Any]) -> Iterator[None]:
        """While open, forwards of rows of these sets have as many at a time as a GPU can take."""
        name, most = "per_device_eval_batch_size", max(map(len, sets))
        before = getattr(self.args, name)
        if self.on_gpu and processes.number() == 1:  # with several most of it would be filled up
            longest = [max(len(row.get("input_ids", ())) for row in listed(rows)) for rows in sets]
            setattr(self.args, name, self._grown(name, max(longest) if min(longest) else 0, most))
        try:
            yield
        finally:
            setattr(self.args, name, before)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> Any:
        """As in Trainer, with all micro-batches of the pass in one step. Runs again when batches get smaller."""
        args.gradient_accumulation_steps = len(dataloader)
        return super().set_initial_training_values(args, dataloader)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The batches one by one: Trainer's list would hold a whole epoch on the device."""
        return _Batches(epoch_iterator, self.args.gradient_accumulation_steps), None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As in Trainer, and after the last micro-batch the one division by the number of items.

        Returns:
            Zero, and for the last micro-batch the mean loss of the pass, so that Trainer logs just that.
        """
        if isinstance(self._sliced, PartedRows):
            part, covers = self._sliced.part(processes.dealt(self._cursor, self._train_batch_size))
            self.one_step.enter_part(part)
            self.one_step.cover(covers)
        # The sums of all processes are added up once, at the end.
        with self.accelerator.no_sync(model), self.without_idle_adapter():
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._loss_sum = self._loss_sum + loss
        return self.end_micro_batch()

    @property
    def adapter_rests(self) -> bool:
        """Whether the adapter adds nothing to any output, and its own gradient is not asked for."""
        return False

    def look_at_adapter(self) -> None:
        """Notes whether the adapter rests, for `without_idle_adapter`."""
        self._aside = self._method.set_aside(self.bare_model) if self.adapter_rests else contextlib.nullcontext()

    def without_idle_adapter(self) -> contextlib.AbstractContextManager[None]:
        """While open, the model does without an adapter that rested when last looked at."""
        return self._aside

    def end_micro_batch(self) -> Tensor:
        """Zero, and after the last micro-batch the mean loss of the pass."""
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        items = self.one_step.finish_pass()
        processes.sum_over([self._loss_sum])
        self.pass_seconds += time.perf_counter() - self._pass_began
        self.one_step.loss = float(self._loss_sum) / items
        return self._loss_sum / items

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """In the pass the *sum* of the rows' losses with dropout off; elsewhere their mean over the labelled items.

        The loss is the task's, for the pass, the search, the guard and the evaluation alike, and the model is not
        asked for one: so uneven micro-batches weigh by their items, and no virtual token has a say.

        Raises:
            ValueError: A loss that is not finite, with the rows it comes from.
        """
        labels = inputs["labels"]
        in_pass = model.training
        if in_pass:
            without_dropout(model)
        places = self._places(len(labels)) if in_pass else []
        with self.head_of_the_pass(places) if in_pass else contextlib.nullcontext() as pulling:
            logits = logits_for(model, {name: value for name, value in inputs.items() if name != "labels"})
        losses, of_rows = self.task.row_losses(logits, labels), self.task.row_items(labels)
        if pulling is not None:  # not for rows that only fill up a batch
            losses = losses + pulling(logits, inputs.get("attention_mask")).masked_fill(of_rows == 0, 0.0)
        loss, items = losses.sum(), of_rows.sum()
        if in_pass:
            if not torch.isfinite(loss):
                bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
                raise ValueError(not_finite(float(loss.detach()), self.name_rows(bad)))
            self.one_step.count(float(items))
            self._cursor += len(labels)
        else:
            self.observe(logits, labels, losses, of_rows)
            loss = loss / items  # NaN where nothing is labelled
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

    def head_of_the_pass(self, places: Sequence[int]) -> contextlib.AbstractContextManager[Pulling | None]:
        """What stands in for the head while a micro-batch of the pass, rows at these places of it, goes forward.

        Where it yields something, that turns the logits into what is added to the rows' losses.
        """
        return contextlib.nullcontext()

    def _places(self, rows: int) -> list[int]:
        """Where in the pass the next rows of this process stand; those behind the last stand where the last does."""
        places = [processes.dealt(self._cursor + i, self._train_batch_size) for i in range(rows)]
        if self._sliced is not None:
            return [self._sliced.row(place) for place in places]
        return [min(place, len(self.pass_rows) - 1) for place in places]

    def observe(self, logits: Tensor, labels: Tensor, losses: Tensor, items: Tensor) -> None:
        """Sees every batch that is scored: the rows' losses `(rows,)` and their numbers of items."""

    def name_rows(self, positions: Sequence[int]) -> str:
        """Rows of the current micro-batch as the user counts them."""
        if self.accelerator.num_processes > 1:
            return f"{len(positions)} rows"
        places = self._places(max(positions) + 1)
        return self.named([self.pass_rows[places[position]] for position in positions], "train_dataset")

    def named(self, rows: Sequence[int], name: str) -> str:
        """Rows of a set, by the numbers that they had when they were handed over."""
        return named_rows(self.tokenise.numbers(name, rows), name)


class _Batches:
    """A sized iterable over the next batches of an iterator, none of them fetched before its turn."""

    def __init__(self, batches: Iterator[Any], number: int) -> None:
        self._batches, self._number = batches, number

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self._batches, self._number)


def without_dropout(model: nn.Module) -> None:
    """Evaluation mode everywhere, but activation-checkpointed layers keep their own training flag: they need it."""
    for module in model.modules():
        training = isinstance(module, GradientCheckpointingLayer)
        if "training" in module.__dict__:  # `eval` would look among parameters first, and this is for every batch
            module.__dict__["training"] = training
        else:  # a scripted module has it elsewhere
            module.training = training


def named_rows(numbers: Sequence[int], name: str) -> str:
    """`rows 3, 17 and 5 more of train_dataset`."""
    more = f" and {len(numbers) - SHOWN_ROWS} more" if len(numbers) > SHOWN_ROWS else ""
    return f"rows {', '.join(map(str, sorted(numbers)[:SHOWN_ROWS]))}{more} of {name}"


def not_finite(loss: float, rows: str) -> str:
    """The message for rows whose loss is not finite."""
    return (
        f"The loss is {loss} for {rows}. Look at these rows; if they are sound, the model's weights or its "
        "precision are not: try `bf16=False`."
    )
