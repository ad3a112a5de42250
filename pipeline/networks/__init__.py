"""Network families and the registry that builds them by name."""
