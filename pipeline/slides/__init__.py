"""Open any slide, check it, and read it on any grid."""
