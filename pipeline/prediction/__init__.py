"""From windows of a slide to maps of nuclei."""
