"""Importers of annotated data, one module per family of formats."""
