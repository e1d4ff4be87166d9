"""Rewards and terminations of imagined steps: where they come from, and those that are known by the environment's id."""
