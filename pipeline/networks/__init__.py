"""Network families, and the registry that builds networks by name."""
