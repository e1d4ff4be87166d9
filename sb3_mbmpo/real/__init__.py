"""The real environment: collecting rollouts, detecting faulty environments, and resuming runs."""
