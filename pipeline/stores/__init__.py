"""The slide's grid, and the files that stages pass on: tiles, maps, the table of nuclei."""
