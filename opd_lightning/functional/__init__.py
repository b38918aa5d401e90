"""Pure functions on tensors: every formula of the package, in one place each."""
