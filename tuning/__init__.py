"""Hyperparameter search for MBMPO with Optuna, on one machine or many: ``python -m tuning.optimize --help``."""
