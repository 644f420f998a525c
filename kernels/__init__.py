"""Hand-written kernel skeletons and the operators that run them."""
