"""Rows that the gradient never sees: which ones, and their losses."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Subset

from onestep_peft import head
from onestep_peft.config import OneStepConfig
from onestep_peft.head import Features
from onestep_peft.step import processes
from onestep_peft.tasks import Task, logits_for
from onestep_peft.tasks.task import UNLABELLED

# So many rows that differ are looked at however many tokens they have: the guard draws rows, not tokens.
ENOUGH = 100


def content_key(row: Mapping[str, Any]) -> bytes:
    """A hash of what is in a tokenised row, the same wherever the row stands."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(row):
        value = row[name]
        value = value.tolist() if hasattr(value, "tolist") else value
        digest.update(f"{name}={value!r};".encode())
    return digest.digest()


def without_padding(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with only what its attention mask leaves of each token's values."""
    mask = row.get("attention_mask")
    if mask is None or all(mask):
        return row

    def kept(value: Any) -> Any:
        by_token = hasattr(value, "__len__") and len(value) == len(mask)
        return [one for one, real in zip(value, mask, strict=True) if real] if by_token else value

    return {name: kept(value) for name, value in row.items()}


def key_of_the_input(row: Mapping[str, Any]) -> bytes:
    """A hash of what a model reads of a row: without its padding, labels and other columns."""
    return content_key({"input_ids": without_padding(row)["input_ids"]} if "input_ids" in row else row)


def by_content(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Row numbers in an order that depends on the rows' contents alone."""
    keys = [content_key(row) for row in rows]
    return sorted(range(len(keys)), key=lambda i: keys[i])


def carve(rows: Sequence[Mapping[str, Any]], fraction: float, maximum: int) -> tuple[list[int], list[int]]:
    """Numbers of the rows that stay and of those that are held out.

    The rows with the smallest hashes are held out, so shuffling the rows changes nothing. Rows of equal content go
    to the same side: a held-out row never stands among the others too.
    """
    keys = [content_key(row) for row in rows]
    copies = Counter(keys)
    room = min(maximum, round(fraction * len(keys)))
    held: set[bytes] = set()
    for key in sorted(copies):
        if copies[key] <= room:
            held.add(key)
            room -= copies[key]
    kept = [i for i, key in enumerate(keys) if key not in held]
    return kept, [i for i, key in enumerate(keys) if key in held]


@dataclass(frozen=True)
class _Known:
    """What is known of held-out rows while no parameter changes.

    Args:
        state: Of all parameters.
        losses: `(rows,)`.
        features: The inputs of the head's last layer, where they were asked for.
        body: The state of all parameters but that layer's, where losses at another such layer follow from the features.
    """

    state: list[tuple[int, int]]
    losses: Tensor
    features: Features | None = None
    body: list[tuple[int, int]] | None = None


def _state(model: nn.Module, but: nn.Module | None = None) -> list[tuple[int, int]]:
    """Where the parameters are and how often they were written, as autograd counts it; but for those of a module."""
    left_out = set(but.parameters()) if but is not None else set()
    return [(one.data_ptr(), one._version) for one in model.parameters() if one not in left_out]


def _values(model: nn.Module) -> Tensor:
    """Sum and norm of each trainable parameter: the same where nothing has another value."""
    moving = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    sums = [part for one in moving for part in (one.sum(dtype=torch.float64), one.norm(dtype=torch.float64))]
    return torch.stack([part.to(sums[0].device) for part in sums]).cpu() if sums else torch.zeros(0)


class HeldOut:
    """Held-out rows, collated once. Several processes share them out, and all of them know every row's loss.

    As long as no parameter changes, losses and features that are known are not computed again. What is written through
    `.data` does not show. Of all that the rows have seen since `settle`, what is known where their mean loss was the
    lowest is kept: the search goes back there, and the head is fitted there.

    Args:
        batches: This process' batches on the model's device, `labels` among their fields.
        positions: By batch, the numbers of its rows in content order; less than the batch's rows where it is padded.
        rows: Number of rows, in all processes.
        task: Gives each row's loss.
    """

    def __init__(
        self, batches: Iterable[Mapping[str, Tensor]], positions: Sequence[Sequence[int]], rows: int, task: Task
    ) -> None:
        self.batches = list(batches)
        self.rows = rows
        self._positions = [torch.tensor(batch, dtype=torch.long) for batch in positions]
        self._task = task
        self._known: _Known | None = None
        self._best: tuple[Tensor, _Known] | None = None
        self._layer: nn.Linear | None = None

    @torch.no_grad()
    def losses(self, model: nn.Module) -> Tensor:
        """The rows' losses at the model as it stands, `(rows,)`, on the CPU, in content order, dropout off.

        A row with several items counts by their number: its losses are summed and divided by the rows' mean number of
        items, so the mean over the rows is the mean over the items.
        """
        known = self._known
        if known is None or not processes.all_say(known.state == _state(model)):
            self._known = known = self._seen(model)
        return known.losses

    def _seen(self, model: nn.Module) -> _Known:
        """By a forward, with the features where a head is to be fitted to them if it ends here."""
        if self._layer is None:
            return _Known(_state(model), self._by_content(self._own_losses(model)))
        known = self._looked_at(model, self._layer)
        mean = float(known.losses.mean())
        if math.isfinite(mean) and (self._best is None or mean < float(self._best[1].losses.mean())):
            self._best = _values(model), known
        return known

    @torch.no_grad()
    def features(self, model: nn.Module, layer: nn.Linear) -> Features:
        """The inputs of the head's last layer for this process' rows, at the model as it stands.

        The same forward gives the losses, and the features are kept until `settle`.
        """
        known = self._known
        if known is None or known.features is None or not processes.all_say(known.state == _state(model)):
            self._known = known = self._seen_before(model, layer) or self._looked_at(model, layer)
        assert known.features is not None
        return known.features

    def placed(self, found: Features) -> Features:
        """All processes' features of rows that `features` gave, an item's row told by its place in content order."""
        pairs = zip(self._positions, self.batches, strict=True)
        places = [nn.functional.pad(own, (0, len(batch["labels"]) - len(own)), value=-1) for own, batch in pairs]
        everyone = replace(found, rows=torch.cat(places).to(found.rows.device)[found.rows]).gathered()
        return everyone.where(everyone.rows >= 0)  # none of what fills up a batch

    def _seen_before(self, model: nn.Module, layer: nn.Linear) -> _Known | None:
        """What is known where the loss was the lowest, if the model is there again."""
        there = self._best is not None and torch.equal(self._best[0], _values(model))
        if not processes.all_say(there) or self._best is None:
            return None
        known = self._best[1]
        return replace(known, state=_state(model), body=_state(model, layer) if known.body is not None else None)

    @torch.no_grad()
    def settle(self, model: nn.Module, layer: nn.Linear) -> None:
        """Takes the losses at the head's last layer as it is now from the features, and lets these go."""
        known, self._known, self._best = self._known, None, None
        self._layer = None if self._task.by_token else layer  # of tokens there may be more than memory has room for
        if known is None or known.features is None:
            return
        if processes.all_say(known.body == _state(model, layer)):
            losses = self._by_content(self._losses_from(known.features, layer))
            self._known = _Known(_state(model), losses)

    def _looked_at(self, model: nn.Module, layer: nn.Linear) -> _Known:
        walked = [
            (self._task.row_losses(logits, labels), found, logits.dtype)
            for logits, labels, found in head.outputs(model, layer, self.batches)
        ]
        own, found = torch.cat([losses for losses, *_ in walked]), Features.joined([found for _, found, _ in walked])
        # Not so where a model changes the layer's outputs, or computes them in 16 bits.
        follows = all(dtype == layer.weight.dtype for *_, dtype in walked) and torch.allclose(
            self._losses_from(found, layer).to(own), own, rtol=1e-4, atol=1e-5
        )
        return _Known(_state(model), self._by_content(own), found, _state(model, layer) if follows else None)

    def _own_losses(self, model: nn.Module) -> Tensor:
        """The losses of the batches' rows, one after the other, by a forward."""
        was_training, losses = model.training, []
        model.eval()
        for batch in self.batches:
            inputs = dict(batch)
            labels = inputs.pop("labels")
            losses.append(self._task.row_losses(logits_for(model, inputs), labels))
        model.train(was_training)
        return torch.cat(losses)

    def _losses_from(self, found: Features, layer: nn.Linear) -> Tensor:
        """The same, by the layer alone."""
        losses = self._task.row_losses(layer(found.x.to(layer.weight.dtype)), found.labels)
        return losses.new_zeros(sum(len(batch["labels"]) for batch in self.batches)).index_add(0, found.rows, losses)

    def _by_content(self, own: Tensor) -> Tensor:
        """All processes' losses in content order, each divided by the rows' mean number of items."""
        losses, items = (torch.zeros(self.rows, device=own.device) for _ in range(2))
        first = 0
        for positions, batch in zip(self._positions, self.batches, strict=True):
            there, labels = positions.to(own.device), batch["labels"]
            losses[there] = own[first : first + len(there)].to(losses)
            items[there] = self._task.row_items(labels)[: len(there)].float()
            first += len(labels)
        processes.sum_over([losses, items])
        return (losses / items.mean()).cpu()


class _Padded(TorchDataset):
    """Rows, and behind them copies of the last one without labels: they have no loss, and so no say."""

    def __init__(self, rows: Any, length: int) -> None:
        self._rows, self._length = rows, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < self._length:
            raise IndexError(i)  # what ends an iteration
        if i < len(self._rows):
            return self._rows[i]
        return without_labels(self._rows[len(self._rows) - 1])


def without_labels(row: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a row that has no loss."""
    labels = torch.as_tensor(row["labels"])
    # To a regression -100 is a number.
    none = torch.full_like(labels, float("nan") if labels.is_floating_point() else UNLABELLED)
    return {**row, "labels": none.tolist()}


def padded(rows: Any, batch_size: int) -> Any:
    """The rows, filled up so that every process gets equally many full batches of them.

    What accelerate would fill up with are rows once more, which would count twice.
    """
    number = processes.number()
    if number == 1:
        return rows
    whole = number * batch_size
    return _Padded(rows, -(-len(rows) // whole) * whole)


def batched_by_length(rows: Sequence[Mapping[str, Any]], batch_size: int) -> tuple[list[int], list[list[int]]]:
    """An order of the rows in which batches hold rows of similar length, and each batch's positions in content order.

    Returns:
        Row numbers in the order in which to batch them, and by batch the places of its rows in `by_content` order.
    """
    content = by_content(rows)
    places = sorted(range(len(content)), key=lambda i: -len(rows[content[i]].get("input_ids", ())))
    batches = [places[i : i + batch_size] for i in range(0, len(places), batch_size)]
    return [content[i] for i in places], batches


@dataclass(frozen=True)
class Split:
    """Which rows do what.

    Args:
        pass_rows: Numbers of the training rows that give the gradient, in the order of the pass.
        held_rows: The held-out rows, or None where nothing has to be chosen or judged.
        held_numbers: Their numbers in the set that they come from.
        held_name: That set's name.
    """

    pass_rows: list[int]
    held_rows: Any
    held_numbers: list[int]
    held_name: str


def split_rows(train: Any, search: Any, config: OneStepConfig, task: Task) -> Split:
    """Deals the training rows out, where no `search_dataset` is given and something has to be chosen or judged.

    Rows without a label are left out everywhere: they have no loss.

    Raises:
        ValueError: Rows must be held out, and too few are left.
    """
    rows = listed(train)
    kept = _labelled(rows, task)
    if not kept:
        raise ValueError("No row of train_dataset has a label. Check the label column.")
    if search is not None:
        numbers = _enough(_labelled(listed(search), task), listed(search), config.search_tokens_max, task)
        return Split(_longest_first(kept, rows), select(search, numbers), numbers, "search_dataset")
    if not config.needs_held_out_rows:
        return Split(_longest_first(kept, rows), None, [], "")
    stay, held = carve([rows[i] for i in kept], config.search_fraction, config.search_rows_max)
    wanted = set(_enough([kept[i] for i in held], rows, config.search_tokens_max, task))
    stay, held = [i for i in range(len(kept)) if kept[i] not in wanted], [i for i in held if kept[i] in wanted]
    if len(held) < 2 or not stay:
        raise ValueError(
            f"{len(kept)} training rows with `search_fraction={config.search_fraction}` leave {len(held)} rows to "
            "choose the step and guard it; it takes at least 2. Give a `search_dataset`, raise `search_fraction`, or "
            "fix `step_size` and set `guard=False`."
        )
    numbers = [kept[i] for i in held]
    return Split(_longest_first([kept[i] for i in stay], rows), select(train, numbers), numbers, "train_dataset")


def _longest_first(numbers: list[int], rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The order does not change a sum, and rows of similar length need little padding.

    The longest come first: if memory does not suffice, it shows at once (where a sample of the rows goes first, at its
    end at the latest).
    """
    return sorted(numbers, key=lambda i: -len(rows[i].get("input_ids", ())))


def _labelled(rows: Sequence[Mapping[str, Any]], task: Task) -> list[int]:
    return [i for i, row in enumerate(rows) if int(task.row_items(torch.as_tensor(row["labels"])[None])) > 0]


def _enough(numbers: list[int], rows: Sequence[Mapping[str, Any]], most: int, task: Task) -> list[int]:
    """As many of these rows as have so many labelled tokens together, but `ENOUGH` at least; of equal ones all or none.

    They are taken by their contents' hashes, so that their order has no say.
    """
    if most == 0 or not task.by_token:
        return numbers
    keys, tokens = {i: content_key(rows[i]) for i in numbers}, 0
    seen: set[bytes] = set()
    taken: list[int] = []
    for i in sorted(numbers, key=lambda i: keys[i]):
        if tokens >= most and len(seen) >= ENOUGH and keys[i] not in seen:
            break
        seen.add(keys[i])
        taken.append(i)
        tokens += int(task.row_items(torch.as_tensor(rows[i]["labels"])[None]))
    return sorted(taken)


def listed(rows: Any) -> list[Any]:
    """The rows, one dict each."""
    return rows.to_list() if isinstance(rows, Dataset) else [rows[i] for i in range(len(rows))]


def select(rows: Any, indices: Sequence[int]) -> Any:
    """Some rows of a set, in this order."""
    return rows.select(indices) if isinstance(rows, Dataset) else Subset(rows, list(indices))
