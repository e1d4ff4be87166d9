"""The learned dynamics: an ensemble of stacked networks and the fit of its members."""

from sb3_mbmpo.dynamics.ensemble import DynamicsEnsemble, Prediction, StepFn, Transitions
from sb3_mbmpo.dynamics.training import FitReport

__all__ = ["DynamicsEnsemble", "FitReport", "Prediction", "StepFn", "Transitions"]
