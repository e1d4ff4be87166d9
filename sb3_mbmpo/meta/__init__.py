"""Meta-learning: the inner step adapts the policy, the outer step improves the meta-policy; both use advantages."""
