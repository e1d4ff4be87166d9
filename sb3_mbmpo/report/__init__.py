"""What a run's models know, as figures and one HTML page: ``python -m sb3_mbmpo.report``."""
