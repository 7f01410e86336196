"""What follows the step on a walk: small steps over further rows, in a metric and at a pace that the step settled.

Each slice of rows that comes after the step moves the layers along its natural gradient under K-FAC, whitened by the
covariances that the step was made of, and each layer by a share of what the step has moved it by. An update that is a
product of rank r stays one (`step/products.py`). Sources: Martens & Grosse, ICML 2015 (the metric); You et al., "Large
batch optimization for deep learning", ICLR 2020 (steps by a layer's own length).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from onestep_peft.step import processes, prompt_steps
from onestep_peft.step.candidates import Evidence
from onestep_peft.step.directions import WhitenedGradient, damped_root, times_transposed
from onestep_peft.step.layers import Layer, LowRank, Prompt
from onestep_peft.step.natural import RowGradients
from onestep_peft.step.parameter_gradients import ParameterGradients
from onestep_peft.step.products import ProductStep, along_the_products, rate_of
from onestep_peft.step.statistics import LayerStatistics, Statistics

# A slice's mean loss above this multiple of what held-out rows lost where the walk began, and so many standard errors
# of such a slice's mean above that, tells that the walk has gone astray: a few dozen rows lose more now and then.
ASTRAY, ERRORS = 1.5, 3.0
Products = Mapping[str, LowRank | None]


def products(layers: Iterable[Layer | Prompt]) -> dict[str, LowRank | None]:
    """What has been written so far, by name, to the layers whose update is a product."""
    return {layer.name: layer.read() for layer in layers if isinstance(layer, Layer) and layer.read is not None}


class Walk:
    """Goes on from where a step ended, or a prompt stands, slice by slice.

    Args:
        layers: What moves.
        parameters: All that may move; without layers they are moved along their gradients as they are.
        head: Those among them that go along with the small steps of a prompt.

    Attributes:
        under_way: Whether the walk has begun.
    """

    def __init__(
        self, layers: Sequence[Layer | Prompt], parameters: Sequence[Tensor], head: Sequence[Tensor] = ()
    ) -> None:
        self._layers, self._parameters, self._head = layers, parameters, head
        self._kept: dict[str, Tensor] = {}

    @property
    def under_way(self) -> bool:
        return bool(self._kept)

    def forget(self) -> None:
        """There is no walk any more."""
        self._kept = {}

    @property
    def losses(self) -> Tensor:
        """The held-out rows' losses where the walk began, `(rows,)`."""
        return self._kept["losses"]

    def check(self, slices: int, at_once: bool = False) -> None:
        """Raises a ValueError where a checkpoint's walk is one through another number of slices, or of another kind."""
        found = int(self._kept["slices"]) if self.under_way else slices
        if found != slices:
            raise ValueError(
                f"The checkpoint is from a walk with `slices={found}`, and the run has {slices}. Resume with the same "
                "`slices`."
            )
        if self.under_way and self._is_at_once != at_once:
            raise ValueError(
                "The checkpoint is from a walk of a prompt in small steps alone, and the run is none, or the other way "
                "round. Resume with the same `direction` and `max_steps`."
            )

    @property
    def _is_at_once(self) -> bool:
        return any(prompt_steps.goes_by(self._kept, layer.name) for layer in self._layers)

    @property
    def pace(self) -> float:
        """Length of a small step at the walk's beginning, layer by layer, by that of the step that it goes on from.

        That of a prompt's entries, which go on from none, is by the entries of the embeddings. From there it falls to
        nothing in a straight line, so that the noise of the last rows is averaged out.
        """
        return float(self._kept["pace"])

    @torch.no_grad()
    def begin(
        self,
        evidence: Evidence,
        before: Products,
        *,
        damping: float,
        pace: float,
        slices: int,
        slice_rows: float,
        losses: Tensor,
    ) -> None:
        """Notes the metric, the pace and the place from which the walk goes on.

        Args:
            evidence: What the pass of the step has left, with the parameters as they were before the step.
            before: The products as they were before the step.
            damping: As in `damped_root`.
            pace: See there.
            slices: Of the whole walk.
            slice_rows: Of each of the slices that follow; infinite where chance plays no part in their mean loss.
            losses: Of the held-out rows after the step, `(rows,)`.
        """
        error = float(losses.std(correction=0)) / math.sqrt(slice_rows)
        numbers = {"pace": pace, "astray": ASTRAY * float(losses.mean()) + ERRORS * error}
        kept = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        kept |= {"moved": torch.tensor(False), "warned": torch.tensor(False), "slices": torch.tensor(slices)}
        kept["losses"] = losses.detach().clone()
        for layer in self._layers:
            record = evidence.statistics[layer.name]
            if not record.is_noise():
                kept |= metric_of(layer, record, damping, _moved(layer, evidence, before))
        if not self._layers:
            for i, parameter in enumerate(self._parameters):
                then = evidence.before.of(parameter).to(parameter.device)
                kept[f"length/{i}"] = (parameter.float() - then.float()).norm()
        self._kept = kept | self._place("start")  # all of it, or nothing

    @torch.no_grad()
    def begin_at_once(self, *, slices: int, losses: Tensor) -> None:
        """Notes the place from which a prompt goes in small steps alone.

        Args:
            slices: Of the walk.
            losses: Of the held-out rows where it begins, `(rows,)`.
        """
        pace = prompt_steps.PACE_WITH_HEAD if self._head else prompt_steps.PACE
        kept = {"pace": torch.tensor(pace, dtype=torch.float64), "slices": torch.tensor(slices)}
        kept["losses"] = losses.detach().clone()
        self._kept = kept | self._place("start") | self._adams()

    def _place(self, name: str) -> dict[str, Tensor]:
        return {f"{name}/{i}": parameter.detach().clone() for i, parameter in enumerate(self._parameters)}

    def _adams(self) -> dict[str, Tensor]:
        """What the small steps of prompts and of the head go by, before the first one."""
        kept: dict[str, Tensor] = {}
        for layer in self._layers:
            assert isinstance(layer, Prompt)
            length = prompt_steps.size((layer.vocabulary or layer.parameter)())
            kept |= prompt_steps.begin_prompt(layer.name, layer.parameter(), length)
        weights = [prompt_steps.size(parameter) for parameter in self._head if parameter.dim() > 1]
        for i, parameter in enumerate(self._head):
            length = prompt_steps.HEAD_PACE / prompt_steps.PACE_WITH_HEAD * weights[0]
            kept |= prompt_steps.begin(f"head/{i}", parameter, length)
        return kept

    @torch.no_grad()
    def advance(
        self, statistics: Mapping[str, Statistics], gradients: ParameterGradients, *, left: float, loss: float
    ) -> None:
        """One small step along the natural gradient of a slice of rows.

        Args:
            statistics: Of the slice, by layer name.
            gradients: Of the slice.
            left: Which share of the walk is left, 1 at its beginning.
            loss: Mean loss of the slice's rows before the step, in nats. Far above that of the held-out rows at the
                walk's beginning the slice makes no step; so far twice in a row, the walk goes back to the last place
                where a slice lost no more than they did (a prompt to its beginning, and so does a walk without such a
                slice), and on at half the pace.
        """
        if self._is_astray(loss):
            return
        # Of a prompt's walk losses say little: the head has not followed yet.
        if loss <= float(self.losses.mean()) and not self._is_at_once:
            self._kept |= self._place("well")
        share = left * self.pace
        self._move_products(statistics, share)
        for layer in self._layers:
            of_layer = statistics[layer.name].gradient
            if prompt_steps.goes_by(self._kept, layer.name):
                assert layer.parameter is not None
                even = prompt_steps.even(of_layer, self._kept, layer.name)
                self._move_by_adam(layer.name, layer.parameter(), even, share)
            elif layer.parameter is not None and f"length/{layer.name}" in self._kept:
                self._move(layer, of_layer, share * self._kept[f"length/{layer.name}"])
        for i, parameter in enumerate(self._head):
            gradient = gradients.of(parameter)
            if gradient is not None and prompt_steps.goes_by(self._kept, f"head/{i}"):
                self._move_by_adam(f"head/{i}", parameter, gradient.float(), share)
        if not self._layers:
            for i, parameter in enumerate(self._parameters):
                gradient = gradients.of(parameter)
                if gradient is not None:
                    rate = rate_of(share * self._kept[f"length/{i}"], gradient.norm())
                    wide = self._wide(parameter)
                    wide.sub_(rate * gradient)
                    parameter.copy_(wide)
        self._kept["moved"] = torch.tensor(True)
        processes.broadcast(self._parameters)

    def _is_astray(self, loss: float) -> bool:
        """Whether a slice's loss forbids a step; where it is the second one in a row, the walk is back."""
        warned = bool(self._kept.get("warned", False))
        # Where the walk began, or went back to, it cannot be astray, however hard a slice's rows are.
        high = bool(self._kept.get("moved", True)) and loss > float(self._kept.get("astray", math.inf))
        self._kept["warned"] = torch.tensor(high and not warned)
        if math.isnan(loss) or (high and warned):
            self._go_to("well" if "well/0" in self._kept else "start")
            self._kept = {name: one for name, one in self._kept.items() if not name.startswith("well/")}
            self._kept |= {"pace": self._kept["pace"] / 2, **(self._adams() if self._is_at_once else {})}
            self._kept["moved"] = torch.tensor(False)
            return True
        return high

    def _move_products(self, statistics: Mapping[str, Statistics], share: float) -> None:
        """A step of all layers whose update is a product."""
        writes, steps = [], []
        for layer in self._layers:
            name, gradient = layer.name, statistics[layer.name].gradient
            # None of a layer that does not walk, or that no row of the slice has reached.
            if not isinstance(layer, Layer) or f"length/{name}" not in self._kept or gradient.dim() == 0:
                continue
            if layer.read is not None and layer.write is not None and (update := layer.read()) is not None:
                roots = self._kept[f"output/{name}"], self._kept[f"input/{name}"]
                steps.append(ProductStep(update, gradient, *roots, share * self._kept[f"length/{name}"]))
                writes.append(layer.write)
        for write, moved in zip(writes, along_the_products(steps), strict=True):
            write(moved)

    def _move(self, layer: Layer | Prompt, gradient: Tensor, length: Tensor) -> None:
        if gradient.dim() == 0:  # no row of the slice has reached it
            return
        output_root, input_root = self._kept[f"output/{layer.name}"], self._kept[f"input/{layer.name}"]
        white = WhitenedGradient.of(gradient, output_root.double(), input_root.double())
        assert layer.parameter is not None
        parameter = layer.parameter()
        wide = self._wide(parameter)
        matrix = layer.as_matrix(wide) if isinstance(layer, Layer) else wide
        matrix.sub_(rate_of(length, white.white.norm()) * white.whole())
        parameter.copy_(wide)

    def _move_by_adam(self, name: str, parameter: Tensor, gradient: Tensor, share: float) -> None:
        wide = self._wide(parameter)
        prompt_steps.move(wide, gradient, self._kept, name, share=share)
        parameter.copy_(wide)

    def _wide(self, parameter: Tensor) -> Tensor:
        """What is moved in a parameter's place: 16 bits would round a small step away, so its sum is kept in fp32."""
        if parameter.dtype.itemsize >= torch.float32.itemsize:
            return parameter
        number = next(i for i, one in enumerate(self._parameters) if one is parameter)
        return self._kept.setdefault(f"wide/{number}", parameter.detach().float())

    @torch.no_grad()
    def go_back(self) -> None:
        """Gives every parameter the bits that it had where the walk began."""
        self._go_to("start")

    def _go_to(self, place: str) -> None:
        for i, parameter in enumerate(self._parameters):
            parameter.copy_(self._kept[f"{place}/{i}"])
            self._kept.pop(f"wide/{i}", None)

    def snapshot(self) -> dict[str, Tensor]:
        """All that the walk goes by, to `load` where a step comes to nothing."""
        in_place = ("adam/", "wide/")
        return {name: one.clone() if name.startswith(in_place) else one for name, one in self._kept.items()}

    def tensors(self) -> dict[str, Tensor]:
        """All that the walk goes by, by name; empty where none is under way."""
        return dict(self._kept)

    def load(self, named: Mapping[str, Tensor]) -> None:
        """Takes over what `tensors` returned."""
        device = self._parameters[0].device
        self._kept = {name: tensor.to(device) for name, tensor in named.items()}


def _moved(layer: Layer | Prompt, evidence: Evidence, before: Products) -> Tensor:
    """By how much a step has moved a layer, `(d_out, d_in)`."""
    if layer.name in before and isinstance(layer, Layer) and layer.read is not None:
        now, then = layer.read(), before[layer.name]
        zero = torch.zeros(())
        return (now.dense() if now is not None else zero) - (then.dense() if then is not None else zero)
    assert layer.parameter is not None
    parameter = layer.parameter()
    moved = parameter.float() - evidence.before.of(parameter).to(parameter.device).float()
    return layer.as_matrix(moved) if isinstance(layer, Layer) else moved


def metric_of(layer: Layer | Prompt, record: Statistics, damping: float, moved: Tensor) -> dict[str, Tensor]:
    """By name, the roots of a layer's covariances, and the length of its move in their metric."""
    assert isinstance(record, LayerStatistics | RowGradients)
    d_out, d_in = layer.shape
    inputs = record.input_covariance
    if isinstance(record, LayerStatistics) and isinstance(layer, Layer) and layer.input_factor == "diagonal":
        # Tokens that the first rows did not have would move by far the most: they count as seen once.
        inputs = inputs.clamp_min(1 / float(record.tokens.clamp_min(1)))
    output_root = damped_root(record.output_grad_covariance, damping, d_out)
    input_root = damped_root(inputs, damping, d_in)
    white = times_transposed(input_root, times_transposed(output_root, moved.double()).T)
    return {
        # As they come back from a file: the order in memory tells in the last bits.
        f"output/{layer.name}": output_root.float().contiguous(),
        f"input/{layer.name}": input_root.float().contiguous(),
        f"length/{layer.name}": white.norm(),
    }
