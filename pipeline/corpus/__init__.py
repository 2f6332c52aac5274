"""Files into documents: which files a corpus has, how they are cut into parts, and what is read out of a part."""
