"""The fresh head's part of a run: fitted before the first step, and again after each."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from onestep_peft import head, out_of_fold
from onestep_peft.between_heads import between
from onestep_peft.callbacks import StepProgress
from onestep_peft.config import OneStepConfig
from onestep_peft.gradient import not_finite
from onestep_peft.head import HeadFit
from onestep_peft.held_out import (
    HeldOut,
    Split,
    batched_by_length,
    by_content,
    listed,
    padded,
    select,
)
from onestep_peft.hub.sharing import SharingTrainer
from onestep_peft.last_fit import Known
from onestep_peft.out_of_fold import FoldHeads, Pulling
from onestep_peft.preparation import Adapted
from onestep_peft.step import processes
from onestep_peft.step.outcome import WALK, StepOutcome
from onestep_peft.step.snapshot import Snapshot

# A head with a few hundred inputs learns nothing more from further tokens.
TOKENS_MAX = 20_000
# What Trainer's checkpoints and a saved pass hold of the head: as it was before it was last fitted again, and as the
# held-out rows chose it before they taught it, too.
BEFORE, CHOSEN = "head_before", "head_chosen"


class HeadTrainer(SharingTrainer):
    """Fits a freshly initialised head on the cached input of its last layer."""

    adapted: Adapted
    held_out: HeldOut | None
    held_rows: Any
    _split: Split
    _progress: StepProgress | None
    _fold_heads: FoldHeads | None = None
    _folds: dict[int, Tensor]
    _kept_heads: dict[str, Tensor]  # beside the optimizer's: a retry finds the checkpoint's there again
    _fitted_to: Known | None = None
    _stack: contextlib.ExitStack

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that a run may change."""
        return [parameter for parameter in self.bare_model.parameters() if parameter.requires_grad]

    def held_out_losses(self) -> Tensor:
        """The held-out rows' losses at the model as it stands, `(rows,)`."""
        assert self.held_out is not None
        return self.held_out.losses(self.bare_model)

    def make_held_out(self) -> HeldOut | None:
        """The held-out rows in batches, each of them seen once; until the run ends forwards are as large as theirs.

        Raises:
            ValueError: A row's loss is not finite.
        """
        held = [] if self.held_rows is None else [self.held_rows]
        sets = [self.train_dataset, *held, *self.evaluation_sets.values()]
        self._stack.enter_context(self.larger_forwards(sets))
        if self.held_rows is None:
            return None
        order, positions = batched_by_length(listed(self.held_rows), self.args.eval_batch_size)
        batches = self.get_test_dataloader(padded(select(self.held_rows, order), self.args.eval_batch_size))
        # Batches are dealt out in turn; one of padding alone has no positions.
        own = positions[processes.rank() :: processes.number()]
        seen = list(batches)
        held_out = HeldOut(seen, own + [[]] * (len(seen) - len(own)), len(self.held_rows), self.task)
        if self.fits_head():  # the same forward gives what the head is fitted to
            held_out.features(self.bare_model, self.head_layer())
        bad = (~torch.isfinite(held_out.losses(self.bare_model))).nonzero().flatten().tolist()
        if bad:
            content = by_content(listed(self.held_rows))
            numbers = [self._split.held_numbers[content[i]] for i in bad]
            raise ValueError(not_finite(float("nan"), self.named(numbers, self._split.held_name)))
        return held_out

    def fits_head(self) -> bool:
        """Whether there is a fresh head and it is wanted fitted.

        Raises:
            ValueError: It is wanted, and there is none.
        """
        config = cast(OneStepConfig, self.args)
        wanted = config.fit_head
        if wanted is True and self.adapted.head is None:
            raise ValueError("`fit_head=True`, but the model has no freshly initialised head. Leave it out.")
        return self.adapted.head is not None and (not config.is_plain if wanted == "auto" else bool(wanted))

    def head_layer(self) -> nn.Linear:
        """The last layer of the fresh head."""
        assert self.adapted.head is not None
        return head.active(self.bare_model, self.adapted.head)

    def another_pass(self) -> bool:
        """Whether a step is still to come."""
        return self.state.global_step < self.state.max_steps

    def fit_head(self, *, install: bool = True, since: HeadFit | None = None) -> Known | None:
        """Fits the head to the rows of the pass (of a walk, of its first slice; or a sample of tokens) and installs it.

        The next pass, if there is one, takes its residuals from heads that are fitted to all folds of the rows but one.

        Args:
            install: False for the heads of the folds alone.
            since: The head that was there before: held-out rows choose how far to go from it to the new one. None for
                all the way.

        Returns:
            What the last fit goes by, where rows are held out and the head was fitted again.

        Raises:
            ValueError: A feature that is not finite, with the rows it comes from.
        """
        layer, numbers = self.head_layer(), self._head_rows(lead=install and since is None)
        found = self._features(numbers)
        bad = found.rows[~torch.isfinite(found.x).all(1)].unique().tolist()
        if bad:
            alone = self.accelerator.num_processes == 1
            named = self.named([self.pass_rows[numbers[i]] for i in bad], "train_dataset") if alone else "some rows"
            raise ValueError(not_finite(float("nan"), named))
        held: tuple[Tensor, Tensor] | None = None
        everyone = found.gathered()
        if self.held_out is not None:
            placed = self.held_out.placed(self.held_out.features(self.bare_model, layer))
            held = placed.x, placed.labels
        fitted = head.fit(
            everyone.x, everyone.labels, held_out=held, outputs=layer.out_features, bias=layer.bias is not None,
            task=self.task,
        )  # fmt: skip
        if install:
            there = between(since, fitted, *held, self.task) if since is not None and held is not None else fitted
            self._install(there)
        if self.held_out is not None:
            self.held_out.settle(self.bare_model, layer)
        if self.another_pass() and self._has_folds:
            apart = self.one_step.bodies.apart
            self._fold_heads = self._heads_at_bodies(numbers, fitted) if apart else self._heads(found, numbers, fitted)
        before = self._noted(BEFORE) if self.held_out is not None else None
        if before is None:
            return None
        return Known(everyone, placed, dataclasses.replace(before, penalty=fitted.penalty))

    def _install(self, fitted: HeadFit) -> None:
        layer = self.head_layer()
        head.install(layer, fitted)
        processes.broadcast(layer.parameters())

    def _note(self, key: str, fitted: HeadFit | None) -> None:
        """Keeps a head for whoever goes on from a checkpoint; None forgets it."""
        parts = {"weight": fitted.weight, "bias": fitted.bias} if fitted is not None else {}
        others = {name: value for name, value in self._kept_heads.items() if not name.startswith(f"{key}.")}
        self._kept_heads = others | {f"{key}.{name}": value for name, value in parts.items() if value is not None}
        self.one_step.kept = self._kept_heads

    def _noted(self, key: str) -> HeadFit | None:
        weight, bias = (self._kept_heads.get(f"{key}.{name}") for name in ("weight", "bias"))
        return None if weight is None else HeadFit(weight, bias, 0.0, None).to(self.args.device)

    def _features(self, numbers: Sequence[int]) -> head.Features:
        """What the head's last layer sees of rows at these places of the pass, as far as this process has them."""
        rows = padded(select(self.train_dataset, numbers), self.args.eval_batch_size)
        batches = self._watched(self.get_test_dataloader(rows), "head")
        return head.features(self.bare_model, self.head_layer(), batches)

    def _heads(self, found: head.Features, numbers: Sequence[int], whole: head.HeadFit) -> FoldHeads | None:
        """The heads of the folds for the features of rows at these places of the pass."""
        folds = self._all_folds(cast(OneStepConfig, self.args).head_folds)
        places = self._places_of(found, numbers)
        number = int(folds.max()) + 1
        return out_of_fold.fit(found.gathered(), places, folds, number, whole, self.task, pulls=self._head_follows)

    @property
    def _has_folds(self) -> bool:
        """Whether the pass takes rows' residuals from heads of folds: few parameters learn no row by heart."""
        return cast(OneStepConfig, self.args).head_folds > 1 and not self.walks_at_once

    @property
    def _head_follows(self) -> bool:
        """Whether the head is fitted again after the step: not where slices follow, nor where nothing is held out."""
        return self.slices == 1 and self.held_out is not None

    def _heads_at_bodies(self, numbers: Sequence[int], whole: head.HeadFit) -> FoldHeads | None:
        """The same for each part of the rows at its body: fold f of part p is fold f · parts + p of all."""
        bodies, folds = self.one_step.bodies, cast(OneStepConfig, self.args).head_folds
        part_of_row = self._all_folds(bodies.parts).tolist()
        heads: list[FoldHeads | None] = []
        for part in range(bodies.parts):
            own = [number for number in numbers if part_of_row[number] == part]
            with bodies.standing_in(part):
                found = self._features(own)
            of_rows, places = self._all_folds(folds * bodies.parts) // bodies.parts, self._places_of(found, own)
            pulls = self._head_follows
            heads.append(out_of_fold.fit(found.gathered(), places, of_rows, folds, whole, self.task, pulls=pulls))
        return FoldHeads.interleaved(heads)

    def _places_of(self, found: head.Features, numbers: Sequence[int]) -> Tensor:
        """Where in the pass the rows of all processes' items stand, `(items,)`.

        Args:
            found: This process' items.
            numbers: Places in the pass of the rows that all processes' items come from.
        """
        rows = [processes.dealt(row, self.args.eval_batch_size) for row in found.rows.tolist()]
        places = [numbers[min(row, len(numbers) - 1)] for row in rows]  # rows behind the last have no labels
        return processes.gathered(torch.tensor(places).to(found.x.device)).cpu()

    def _all_folds(self, folds: int) -> Tensor:
        """The fold of each row of the pass, `(rows,)`."""
        if folds not in self._folds:
            self._folds[folds] = out_of_fold.fold_of_each(listed(self.train_dataset), folds)
        return self._folds[folds]

    def head_of_the_pass(self, places: Sequence[int]) -> contextlib.AbstractContextManager[Pulling | None]:
        """For each row the head that was fitted without its fold, and the row's pull on those of the others."""
        # On a walk the body has not seen the next rows, and it has moved to suit the head that is there.
        if self._fold_heads is None or self.one_step.walk.under_way:
            return super().head_of_the_pass(places)
        folds = self._all_folds(len(self._fold_heads.weight))
        there = torch.tensor(places)
        return self._fold_heads.answering(self.head_layer(), folds[there], there)

    def fixed_in_the_pass(self) -> dict[str, Tensor]:
        """The heads of the folds, and the head before."""
        before = {name: value for name, value in self._kept_heads.items() if name.startswith(BEFORE)}
        return before | ({} if self._fold_heads is None else self._fold_heads.tensors())

    def take_up_fixed(self, named: Mapping[str, Tensor]) -> None:
        """The heads of the folds, where there were any, and the head before."""
        self._fold_heads = FoldHeads.among(named)
        if (weight := named.get(f"{BEFORE}.weight")) is not None:
            self._note(BEFORE, HeadFit(weight, named.get(f"{BEFORE}.bias"), 0.0, None))

    def _head_rows(self, lead: bool) -> list[int]:
        """Places in the pass of the rows that the head is fitted to: all, unless they have too many tokens.

        The sample follows from the rows' contents, so that their order does not matter.

        Args:
            lead: Whether a walk is to begin: then it is to those of its first slice, so that neither the head nor the
                body has seen the rows of the others when their turn comes.
        """
        places = list(range(len(self.pass_rows)))
        if lead and self.leads and self._sliced is not None:
            places = self._sliced.lead
        if not self.task.by_token:
            return places
        rows, tokens, taken, wanted = listed(self.train_dataset), 0, [], set(places)
        for i in by_content(rows):
            if tokens >= TOKENS_MAX:
                break
            if i in wanted:
                tokens += int(self.task.row_items(torch.as_tensor(rows[i]["labels"])[None]))
                taken.append(i)
        return sorted(taken)  # the pass has its rows by length

    def refit_fold_heads(self) -> None:
        """Fits the heads of the folds, where there are any, to the features as they are; the head stays."""
        if self.held_out is not None and self.fits_head():
            self.held_out.settle(self.bare_model, self.head_layer())
        if self.fits_head() and self._has_folds:
            self.fit_head(install=False)

    def settle_head(self) -> None:
        """Fits the head to where a prompt's small steps have ended: without it nobody could judge them.

        Should they be refused, the head is taken back with the prompt.
        """
        with self.clock("head"):
            since = head.current(self.head_layer())
            self._note(BEFORE, since)
            self._fitted_to = self.fit_head(since=since)

    def follow(self, outcome: StepOutcome) -> None:
        """After a step: fits the head once more, or where no rows are held out to say how far, those of the folds."""
        if self.walks_at_once:  # `settle_head` has done so
            outcome.head_refitted = outcome.accepted
            if not outcome.accepted:
                self._note(BEFORE, None)
                self._fitted_to = None
            return
        with self.clock("head"):
            if self.held_out is not None:
                self.refit_head(outcome)
            elif self.another_pass():
                self.refit_fold_heads()

    def refit_head(self, outcome: StepOutcome) -> None:
        """Fits the head once more, to the features that the step has moved.

        The step knows the rows that the head is fitted to, and what fits them best is not always best elsewhere: it
        goes to the new head as far as helps held-out rows. After a walk whose steps were refused it is that of all rows
        which takes the place of the first slice's.
        """
        layer = self.head_layer()
        before, since = Snapshot(layer.parameters()), head.current(layer)
        if outcome.accepted or outcome.direction == WALK:  # small steps follow one that was accepted
            self._note(BEFORE, since)
            self._fitted_to = None
        try:
            known = self.fit_head(since=since)
            loss = float(self.held_out_losses().mean())
        except BaseException:  # out of memory, say, and Trainer goes on with smaller batches
            before.restore()
            raise
        # It may be large, and is not kept through another pass.
        self._fitted_to = None if self.another_pass() else known
        outcome.head_refitted = loss < (outcome.loss_after if outcome.accepted else outcome.loss_before)
        if not outcome.head_refitted:
            before.restore()
        elif outcome.accepted:
            outcome.loss_after = loss

    def take_up_heads(self) -> HeadFit | None:
        """What a Trainer's checkpoint has kept of the head: what is to be used again, and the one that was chosen."""
        self._kept_heads = dict(self.one_step.kept)
        chosen = self._noted(CHOSEN)
        if self.another_pass():
            self._note(CHOSEN, None)
        return chosen

    def take_up_head(self, chosen: HeadFit | None) -> None:
        """From a Trainer's checkpoint: the heads of the folds, and for more steps a head without the held-out rows."""
        if self.fits_head() and self.another_pass() and not self.one_step.walk.under_way:
            if chosen is not None:
                self._install(chosen)
            elif self.held_out is not None and self._noted(BEFORE) is None:
                # Without the optimizer's state nobody knows what the head has seen.
                self.fit_head()
                return
        self.refit_fold_heads()

    def show_point(self, direction: str, step_size: float, loss: float) -> None:
        """Tells of a point that a search has looked at."""
        if self._progress is not None:
            self._progress.advance(f"{direction}: loss {loss:.4f} at {step_size:.3g}")

    def _watched(self, batches: DataLoader, what: str) -> Iterator[Any]:
        if self._progress is not None:
            self._progress.start(what, len(batches), "batch")
        for batch in batches:
            yield batch
            if self._progress is not None:
                self._progress.advance()
        if self._progress is not None:
            self._progress.close()
