"""All nuclei of a slide, exactly, block by block."""
