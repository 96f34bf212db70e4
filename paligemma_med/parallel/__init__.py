"""Several devices and several processes: who holds which part of an array, and who speaks."""
