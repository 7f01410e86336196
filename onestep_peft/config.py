"""OneStepConfig: TrainingArguments with the step's own fields."""

from __future__ import annotations

import copy
import dataclasses
import math
import numbers
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from onestep_peft import arguments
from onestep_peft.batch_sizes import USUAL
from onestep_peft.errors import nearest
from onestep_peft.step.directions import DIRECTIONS, NATURAL, PARAMETER_DIRECTIONS

AUTO = "auto"
#: Directions that a user can name.
KNOWN_DIRECTIONS = (AUTO, *PARAMETER_DIRECTIONS, *DIRECTIONS, NATURAL)


@dataclass(repr=False)  # the one that dataclasses make would show the token, which that of TrainingArguments leaves out
class OneStepConfig(TrainingArguments):
    """Trainer's arguments, with a single step's defaults and a few fields of its own.

    Args:
        method: What moves: "lora", "full" (the model's own weights) or "prompt_tuning"; None for what `peft_config`
            stands for, and LoRA without one.
        direction: "auto" (several candidates from one pass, held-out rows choose; a prompt's walk has none), one of
            "sgd", "sign", "muon", "lora_one", "kfac", "kfac_muon", "kfac_schatten" and (for prompts) "natural", or a
            list to choose from. A rule for layers may name its rank: "kfac:8".
        step_size: η of the update, or "search" to find it on held-out rows.
        max_steps: Number of steps, each with a pass, a search and a guard of its own.
        slices: Walk through the rows in so many slices, dealt out by content. The first, a fifth of the rows (with a
            head 600 at most, or more if the rarest class has not 16 among these), makes the step that is searched (and
            teaches a fresh head, until all rows do at the end); each of the others makes a small one on from there,
            which costs no search. "auto": up to 101, of 40 rows at least, where a fifth is 300 rows and 16 for each
            output of the head; for language models of 3,000 tokens at least, from 80,000 on that are learnt; else one,
            and so with a head where `max_steps` is above 1. A prompt goes in small steps alone, of two rows each and at
            most 500, from 200 rows on, and so by any number of slices, where `direction` is "auto" and `max_steps` 1:
            it begins where it is drawn, and what a text had given it is not kept. With a fixed step size the slices are
            alike and each makes a step of that size.
        stop_at: With several steps, stop once `metric_for_best_model` on the held-out rows reaches this.
        damping: λ of the `kfac` family, in units of each covariance's mean eigenvalue.
        rank: Rank of directions that name none; None for the smaller of 8 and the adapter's r, and for full weights
            the full one.
        search_budget: The most forwards of single rows that "auto" may spend on comparing candidates: it tries as many
            as fit, and always one. None for 20,000 or twice the work of the pass, whichever is more.
        fit_head: Whether to fit a freshly initialised head first. "auto": whenever there is one, except for the
            plain step (`direction="sgd"` at a fixed step size), which changes nothing but what the gradient says.
        refit_on_held_out: Whether the held-out rows, once they have chosen everything, teach the head, too: it is
            fitted for the last time, to all rows, as far as those held-out rows gain that such a fit leaves out (in 5
            folds). Rows that are in `eval_dataset` stay out of it. Scores of a `search_dataset` flatter afterwards.
        tune_threshold: Whether a fresh head, where `metric_for_best_model` is an F1, is made to say yes from a lower
            probability than one half: the one from which on held-out rows promise the best F1. It is done in the end,
            by raising its bias, so its probabilities for yes are too high afterwards; whoever trains such a model on
            should know. For two classes (the F1 of class 1) and for several labels a row (the F1 over all of them),
            whatever the metric is called: it counts as an F1 if it gives the values of one on held-out rows. `stop_at`
            compares scores from before.
        head_folds: The pass takes each row's residual from a head that was fitted without it: the rows are dealt into
            so many folds, and each fold's head is fitted to the others. Where the head is fitted again after the step
            (so not in walks and slices, nor without held-out rows; and not in tasks by token), half of the gradient
            goes through these fits, too: the heads follow what the step moves. 1 for the one fitted head, as it is.
        body_folds: With several steps over the same rows, each row's gradient after the first step is taken at a body
            that has not moved by it: the rows are dealt into so many parts, and each part's body is moved by the
            others. Holds a copy of what moves, and of its statistics, for each part. 1 for the model itself; so it is
            where the step size is fixed.
        covariance_rows: Where there are at least twice as many rows (in each part, where there are parts), the layers'
            covariances are taken from a sample of so many, or somewhat more, alike by class. The gradient is always
            that of all rows. Not for slices.
        search_fraction: Share of the training rows that is held out where there is no `search_dataset`.
        search_rows_max: The most rows that are held out of the training set.
        search_tokens_max: In tasks by token, only so many of the held-out rows are looked at as have so many labelled
            tokens together, but at least 100: every point of a search takes a forward of them. 0 for all.
        guard: Whether held-out rows may refuse the step. The plain step is guarded only by a `search_dataset`:
            nothing is held out of its rows.
        max_length: Tokens of a row with text, the special ones counted; longer rows are cut, and plain texts for text
            generation are taken in pieces. None for the model's limit, at most 512.
        guard_confidence: Below this share of resampled row sets that show a gain, the report calls it weak.
        save_pass_minutes: Save the sums of the pass so often, in minutes, so that an interrupted run goes on where it
            was; 0 for never.
        save_pass_batches: The same by micro-batches.
        per_device_train_batch_size: Rows in a micro-batch; sets memory and speed, never the result. 0 for 16, and on a
            GPU for as many more as give it something to do where the model has a head and is small; with several
            processes only in a walk. Configurations that are read back, or made from another, have the 16.
        per_device_eval_batch_size: Rows in a batch of forwards. 0 for 32, and while it trains on a single GPU likewise
            for more.
    """

    method: str | None = field(default=None, metadata={"help": "What moves: lora (default), full or prompt_tuning."})
    direction: str | list[str] = field(
        default=AUTO, metadata={"help": f"{', '.join(KNOWN_DIRECTIONS)}, or several of them."}
    )
    step_size: str | float = field(default="search", metadata={"help": '"search", or a number.'})
    max_steps: int = field(default=1, metadata={"help": "Number of steps, each over all rows."})
    slices: int | str = field(
        default=AUTO, metadata={"help": "Walk on in small steps, one for each of so many slices."}
    )
    stop_at: float | None = field(
        default=None, metadata={"help": "Stop once metric_for_best_model reaches this on held-out rows."}
    )
    damping: float = field(default=0.1, metadata={"help": "Damping of the kfac family, in mean eigenvalues."})
    rank: int | None = field(
        default=None, metadata={"help": "Rank of directions that name none (8; full weights: full)."}
    )
    search_budget: int | None = field(
        default=None, metadata={"help": "Forwards of rows that the search of auto may take."}
    )
    fit_head: str | bool = field(default="auto", metadata={"help": "Fit a fresh head first: auto, true or false."})
    refit_on_held_out: bool = field(
        default=True, metadata={"help": "Fit the head to the held-out rows, too, once they have chosen everything."}
    )
    tune_threshold: bool = field(
        default=True, metadata={"help": "Where metric_for_best_model is an F1: say yes from where that is best."}
    )
    head_folds: int = field(
        default=5, metadata={"help": "Folds of the rows, whose residuals come from heads fitted to the others (1: no)."}
    )
    body_folds: int = field(
        default=2,
        metadata={"help": "With several steps: parts of the rows, each with a body that the others move."},
    )
    covariance_rows: int = field(
        default=1500, metadata={"help": "With many rows, the layers' covariances come from a sample of so many."}
    )
    search_fraction: float = field(default=0.1, metadata={"help": "Share of the training rows held out."})
    search_rows_max: int = field(default=512, metadata={"help": "The most training rows held out."})
    search_tokens_max: int = field(
        default=10_000, metadata={"help": "The most labelled tokens of held-out rows that are looked at; 0 for all."}
    )
    guard: bool = field(default=True, metadata={"help": "Whether held-out rows may refuse the step."})
    guard_confidence: float = field(default=0.95, metadata={"help": "Below this a gain is called weak."})
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of a row (default: the model's limit, at most 512)."}
    )
    save_pass_minutes: float = field(default=5.0, metadata={"help": "Save the unfinished pass so often (0: never)."})
    save_pass_batches: int | None = field(default=None, metadata={"help": "The same, every so many micro-batches."})
    save_strategy: str = field(default="no", metadata={"help": "Trainer's checkpoints (default: none)."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Not used: a step is never clipped."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Not used: there is no schedule."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps."})
    per_device_train_batch_size: int = field(
        default=0,
        metadata={"help": "Rows in a micro-batch: memory and speed only (default: 16, or what suits a GPU)."},
    )
    per_device_eval_batch_size: int = field(
        default=0, metadata={"help": "Rows in a batch of forwards (default: 32, or what suits a GPU)."}
    )
    train_sampling_strategy: str = field(
        default="sequential", metadata={"help": "Not used: the pass goes longest first."}
    )

    def __post_init__(self) -> None:
        self._check_direction()
        self._check_step()
        if self.slices != AUTO:
            if isinstance(self.slices, str) and self.slices.isdecimal():  # from the command line
                self.slices = int(self.slices)
            _check_range("slices", self.slices, 1, None, '"auto"', whole=True)
        _check_range("damping", self.damping, 0, None, "0.1")
        _check_range("head_folds", self.head_folds, 1, None, "5", whole=True)
        _check_range("body_folds", self.body_folds, 1, None, "2", whole=True)
        _check_range("covariance_rows", self.covariance_rows, 1, None, "1500", whole=True)
        _check_range("search_fraction", self.search_fraction, 0, 0.9, "0.1")
        _check_range("guard_confidence", self.guard_confidence, 0.5, 1, "0.95")
        _check_range("search_rows_max", self.search_rows_max, 1, None, "512", whole=True)
        _check_range("search_tokens_max", self.search_tokens_max, 0, None, "10000", whole=True)
        if self.search_budget is not None:
            _check_range("search_budget", self.search_budget, 1, None, "None", whole=True)
        _check_range("save_pass_minutes", self.save_pass_minutes, 0, None, "5")
        if self.save_pass_batches is not None:
            _check_range("save_pass_batches", self.save_pass_batches, 1, None, "None", whole=True)
        if self.rank is not None:
            _check_range("rank", self.rank, 1, None, "8", whole=True)
        if self.max_length is not None:
            _check_range("max_length", self.max_length, 2, None, "None", whole=True)
        if self.stop_at is not None:
            _check_range("stop_at", self.stop_at, -math.inf, None, "None")
        if not isinstance(self.guard, bool):
            raise ValueError(f"`guard={self.guard!r}` must be True or False; the default is True.")
        # No field: whoever reads the configuration back has the numbers, and they hold.
        self.batches_may_grow = {name for name in USUAL if getattr(self, name) == 0}
        for name, usual in USUAL.items():
            _check_range(name, getattr(self, name), 0, None, "0", whole=True)
            setattr(self, name, getattr(self, name) or usual)
        arguments.refuse(self)
        arguments.ignore(self, stacklevel=3)
        super().__post_init__()
        arguments.refuse(self)  # files and the launcher's environment have been read by now
        if self.device.type == "cpu":  # pinning memory without an accelerator only warns
            self.dataloader_pin_memory = False
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs in one process: Trainer would use DataParallel, whose gradient is not exact. "
                "Set CUDA_VISIBLE_DEVICES to one GPU."
            )

    @property
    def directions(self) -> tuple[str, ...]:
        """The candidates by name; ("auto",) leaves them to the method."""
        return (self.direction,) if isinstance(self.direction, str) else tuple(self.direction)

    @property
    def fixed_step_size(self) -> float | None:
        """η, or None for a search."""
        return None if self.step_size == "search" else float(self.step_size)

    @property
    def walks(self) -> bool:
        """Whether there are small steps, after one that is searched or alone; to be asked once "auto" is settled."""
        return self.slices not in (AUTO, 1) and self.fixed_step_size is None

    @property
    def is_plain(self) -> bool:
        """Whether the step is θ ← θ − η∇L and nothing else."""
        return self.directions == ("sgd",) and self.fixed_step_size is not None

    @property
    def chooses(self) -> bool:
        """Whether held-out rows choose a direction or a step size."""
        return self.fixed_step_size is None or len(self.directions) > 1 or self.direction == AUTO

    @property
    def needs_held_out_rows(self) -> bool:
        """Whether something has to be chosen or judged. The plain step asks for neither."""
        return self.chooses or (self.guard and not self.is_plain)

    def _check_direction(self) -> None:
        if not isinstance(self.direction, str | list | tuple):
            raise ValueError(f'`direction={self.direction!r}`: give "auto", a name, or a list of names.')
        names = [self.direction] if isinstance(self.direction, str) else list(self.direction)
        for name in names:
            rule, _, rank = str(name).partition(":")
            if rule not in KNOWN_DIRECTIONS:
                near = nearest(rule, KNOWN_DIRECTIONS)
                raise ValueError(f"`direction={name!r}` is none of {', '.join(KNOWN_DIRECTIONS)}.{near}")
            if rule != name and (rule not in DIRECTIONS or not rank.isdecimal() or int(rank) < 1):
                raise ValueError(
                    f"`direction={name!r}`: a rank is a whole number from 1 on, and goes with {', '.join(DIRECTIONS)}."
                )
        if not names or ("auto" in names and len(names) > 1) or len(set(names)) < len(names):
            raise ValueError(f'`direction={names!r}`: give "auto", or one or more different names.')
        self.direction = names[0] if len(names) == 1 else names

    def _check_step(self) -> None:
        if self.step_size != "search":
            try:
                if isinstance(self.step_size, bool):
                    raise TypeError
                self.step_size = float(self.step_size)
            except (TypeError, ValueError):
                raise ValueError(f'`step_size={self.step_size!r}` is neither "search" nor a number.') from None
            if not 0 < self.step_size < math.inf:
                raise ValueError(f'`step_size={self.step_size!r}` must be above 0 and finite; the default is "search".')
        text = str(self.fit_head).lower()
        if text not in ("auto", "true", "false"):
            raise ValueError(f'`fit_head={self.fit_head!r}`: give "auto", True or False.')
        self.fit_head = text if text == "auto" else text == "true"
        _check_range("max_steps", self.max_steps, 1, None, "1", whole=True)

    @classmethod
    def upcast(cls, args: TrainingArguments | None) -> OneStepConfig:
        """A OneStepConfig from plain TrainingArguments, as TRL does it."""
        if isinstance(args, cls):
            return copy.copy(args)  # what a trainer sets in it stays with that trainer
        if args is None:
            return cls(output_dir="onestep_output")
        if not isinstance(args, TrainingArguments):
            raise ValueError(f"`args={args!r}` is no OneStepConfig. Pass `args=OneStepConfig(output_dir=...)`.")
        names = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
        # Batch sizes stay as they are: whoever passes plain TrainingArguments counts on their memory.
        own = {name for name in cls.__annotations__ if not name.startswith("per_device")}
        # Where the user left a stock default, the step's own default holds.
        stock = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
        values = {name: getattr(args, name) for name in names}
        if args.eval_strategy == "steps" and args.eval_steps == args.logging_steps:
            values["eval_steps"] = None  # it came from there, and the step logs more often
        kept = {name: value for name, value in values.items() if not (name in own and value == stock[name])}
        return cls(**kept)


def _check_range(name: str, value: Any, low: float, high: float | None, usual: str, *, whole: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
        raise ValueError(f"`{name}={value!r}` must be a {'whole ' * whole}number; the default is {usual}.")
    number = float(value)
    if not math.isfinite(number) or number < low or (high is not None and number > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"`{name}={value!r}` must be {bound}; the default is {usual}.")
