"""One module per data set; each defines ``SPEC``."""
