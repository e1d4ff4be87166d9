"""Rollouts in the learned environment."""
