"""The learned dynamics: an ensemble of stacked networks and the fit of its members."""

from sb3_mbmpo.dynamics.ensemble import DynamicsEnsemble, Prediction, StepFn, Transitions
from sb3_mbmpo.dynamics.perturbation import output_bias_array, perturbed_step_fns
from sb3_mbmpo.dynamics.training import FitReport

__all__ = [
    "DynamicsEnsemble",
    "FitReport",
    "Prediction",
    "StepFn",
    "Transitions",
    "output_bias_array",
    "perturbed_step_fns",
]
