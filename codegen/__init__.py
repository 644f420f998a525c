"""From a Spec to source or operators, one module for each target."""
