"""Reproducing the paper: a queue of runs, one content-addressed folder each, that any number of processes work off."""
