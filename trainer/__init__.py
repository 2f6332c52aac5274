"""Pretraining of the small language model on label shards."""
