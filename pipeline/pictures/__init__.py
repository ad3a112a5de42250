"""Pictures of a slide."""
