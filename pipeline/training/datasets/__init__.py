"""Readers of annotated data, one module a family of formats."""
