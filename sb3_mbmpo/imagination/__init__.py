"""Imagined rollouts, in the learned environment."""
