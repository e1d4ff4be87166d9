"""The command line: ``python -m sb3_mbmpo train``."""
