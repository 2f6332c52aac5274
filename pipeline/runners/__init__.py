"""Where a graph runs: on this machine, or elsewhere through Beam."""
