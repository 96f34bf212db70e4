"""What a config may say: its keys and values, durations, and the files it is kept in."""
