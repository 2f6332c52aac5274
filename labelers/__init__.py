"""Text to tokens, tokens to signals, signals to labels. Plain functions over arrays; no Beam."""
