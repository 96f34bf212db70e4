"""One folder a data set: its released layout, its builder, its README and citations."""
