"""What a run of many slides needs: its settings and slides, locks, limits, restarts, state."""
