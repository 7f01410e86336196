"""The small steps of a prompt and its head: Adam's, along gradients in which every virtual token counts alike.

Layers normalise what they read, so of a virtual token they see the direction. Steps that are long beside the token
leave where it began behind: what it then points along is the mean of the steps so far, in which each further one counts
for less. So one length serves all tasks. Sources: Kingma & Ba, "Adam: A method for stochastic optimization", ICLR 2015
(the rule is torch's own); Seetharaman et al., "AutoClip: Adaptive gradient clipping", MLSP 2020 (a gradient is cut by
what the ones before it have been, here by their mean length).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.adam import adam

# Length of the first step, entry by entry, by the root mean square of the entries of real tokens (a prompt's own may
# have grown in a walk before): of a prompt alone; and of one whose head goes along, so that gradients stay those of a
# head that fits, and is fitted in the end.
PACE, PACE_WITH_HEAD = 4.0, 16.0
# That of the head's first step, by its own weights' root mean square.
HEAD_PACE = 0.06
BETAS, EPSILON = (0.9, 0.999), 1e-8
LENGTH, MEAN, SQUARE, COUNT, NORM = "length", "adam/mean", "adam/square", "adam/count", "adam/norm"


def begin(name: str, parameter: Tensor, length: Tensor) -> dict[str, Tensor]:
    """What a parameter's steps go by, by name, before the first one.

    Args:
        name: The parameter's.
        parameter: The prompt, `(tokens, d)`, or one of the head's.
        length: Of its first step, entry by entry, at a pace of 1.
    """
    return {
        f"{LENGTH}/{name}": length,
        f"{MEAN}/{name}": torch.zeros_like(parameter, dtype=torch.float32),
        f"{SQUARE}/{name}": torch.zeros_like(parameter, dtype=torch.float32),
        f"{COUNT}/{name}": torch.zeros((), dtype=torch.float32),
    }


def size(parameter: Tensor) -> Tensor:
    """Root mean square of the entries, `()`."""
    entries = parameter.detach()
    return torch.linalg.vector_norm(entries, dtype=torch.float32) / math.sqrt(entries.numel())


def begin_prompt(name: str, prompt: Tensor, length: Tensor) -> dict[str, Tensor]:
    """The same for a prompt `(tokens, d)`."""
    return begin(name, prompt, length) | {f"{NORM}/{name}": prompt.new_zeros(len(prompt), 1, dtype=torch.float32)}


def even(gradient: Tensor, kept: Mapping[str, Tensor], name: str) -> Tensor:
    """A prompt's gradient `(tokens, d)`, each token's by its mean length so far, and none of them longer than 1.

    So every token counts alike, and so do slices, but those that have little to say.
    """
    lengths, mean = gradient.float().norm(dim=1, keepdim=True), kept[f"{NORM}/{name}"]
    mean += (lengths - mean) / (float(kept[f"{COUNT}/{name}"]) + 1)
    return gradient.float() / torch.maximum(lengths, mean).clamp_min(torch.finfo(torch.float32).tiny)


def goes_by(kept: Mapping[str, Tensor], name: str) -> bool:
    """Whether the parameter of this name moves by these steps."""
    return f"{MEAN}/{name}" in kept


def move(parameter: Tensor, gradient: Tensor, kept: Mapping[str, Tensor], name: str, *, share: float) -> None:
    """One step; the means that it goes by are changed in place.

    Args:
        parameter: fp32; moved in place.
        gradient: Of a slice of rows, of the same shape.
        kept: As `begin` returned it.
        name: The parameter's.
        share: Length of the step by the first one's at a pace of 1.
    """
    adam(
        [parameter], [gradient], [kept[f"{MEAN}/{name}"]], [kept[f"{SQUARE}/{name}"]], [], [kept[f"{COUNT}/{name}"]],
        amsgrad=False, beta1=BETAS[0], beta2=BETAS[1], lr=share * float(kept[f"{LENGTH}/{name}"]), weight_decay=0.0,
        eps=EPSILON, maximize=False, foreach=False,
    )  # fmt: skip
