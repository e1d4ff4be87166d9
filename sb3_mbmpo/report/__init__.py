"""A report on the models of a run, as figures and one HTML page: ``python -m sb3_mbmpo.report``."""
