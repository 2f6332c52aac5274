"""What tests of several packages share: small models, corpora, datasets, servers, the real command."""
