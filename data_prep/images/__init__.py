"""Images of data sets: read, converted, checked, and stored once."""
