"""One folder per data set: its released layout, its builder, its README and citations."""
