"""The Beam graphs: a corpus in, a dataset of labelled parts out."""
