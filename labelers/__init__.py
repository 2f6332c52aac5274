"""Text to tokens, tokens to signals, signals to labels. Plain functions over arrays; no Beam."""

# In every manifest. Raise it whenever a verdict of lacy.labelers.grammar may change. It stands here because importing
# spaCy takes seconds, and a command that only compares manifests needs none of it.
GRAMMAR_VERSION = "new-facts-1"
