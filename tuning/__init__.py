"""Search for MBMPO's hyperparameters with Optuna, on one machine or many: ``python -m tuning.optimize --help``."""
