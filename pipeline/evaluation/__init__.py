"""Scores of nuclei against known ones."""
