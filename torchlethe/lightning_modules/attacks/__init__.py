"""Universal adversarial perturbations: one module for each method on one base."""
