"""MediaWiki markup as plain text."""
