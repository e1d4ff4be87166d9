"""Learning curves of MBMPO and of what an SB3 user would pick instead: ``python -m tuning.results --help``.

Legend: a *queue* (YAML) lists *runs*, one for each algorithm, environment and seed; a run writes one CSV file, a row for each
evaluation; the *page* shows all of them.
"""
