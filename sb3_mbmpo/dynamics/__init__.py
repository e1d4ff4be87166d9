"""The learned dynamics: an ensemble of networks with stacked weights, and the training of its members."""

from sb3_mbmpo.dynamics.disagreement import DisagreementPenalty
from sb3_mbmpo.dynamics.ensemble import DynamicsEnsemble
from sb3_mbmpo.dynamics.options import CLIP_MARGIN, DynamicsOptions
from sb3_mbmpo.dynamics.perturbation import output_bias_array, perturbed_step_fn
from sb3_mbmpo.dynamics.training import FitReport
from sb3_mbmpo.dynamics.types import Prediction, StepFn, Transitions

__all__ = [
    "CLIP_MARGIN",
    "DisagreementPenalty",
    "DynamicsEnsemble",
    "DynamicsOptions",
    "FitReport",
    "Prediction",
    "StepFn",
    "Transitions",
    "output_bias_array",
    "perturbed_step_fn",
]
