"""Model packages and classifiers: read, checked and written."""
