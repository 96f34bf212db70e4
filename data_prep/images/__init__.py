"""Images of data sets: reading, converting, checking, and storing each once."""
