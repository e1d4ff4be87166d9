"""Meta-learning: the inner step that adapts, the outer step that learns to be adapted, and the advantages of both."""
