"""Files from other programs, read without executing anything in them."""
