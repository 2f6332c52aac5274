"""Reads label shards and pretrains the small language model on them."""
