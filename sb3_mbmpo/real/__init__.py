"""The real environment: collecting rollouts, what it gets wrong, and going on where a run ended."""
