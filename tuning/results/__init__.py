"""Learning curves of MBMPO and of the algorithms that an SB3 user would pick instead: ``python -m tuning.results --help``.

Terms: a *queue* (YAML) lists *runs*, one for each algorithm, environment and seed. A run writes one CSV file with one row for
each evaluation. The *page* shows all runs. *Peers* are the algorithms that MBMPO is compared with.
"""
