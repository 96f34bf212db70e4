"""SLAKE 1.0: English and Chinese questions about 642 radiological images."""
