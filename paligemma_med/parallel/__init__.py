"""Several devices and processes: which part of an array each holds, and what they exchange."""
