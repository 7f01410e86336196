"""Adapt a pretrained model in one optimization step."""

from onestep_peft.config import OneStepConfig
from onestep_peft.hub.load import load
from onestep_peft.report import StepReport
from onestep_peft.trainer import OneStepTrainer
from onestep_peft.version import __version__

__all__ = ["OneStepConfig", "OneStepTrainer", "StepReport", "__version__", "load"]
