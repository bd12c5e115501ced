"""Making trained classifiers forget."""
