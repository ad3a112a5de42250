"""Training: from annotated fields to a model package."""
