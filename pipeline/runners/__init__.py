"""Running a graph: on this machine, or on another runner of Beam."""
