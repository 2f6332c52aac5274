"""Labelling: a corpus in, a dataset of labelled parts out."""
