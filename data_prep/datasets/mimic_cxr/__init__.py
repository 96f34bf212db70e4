"""MIMIC-CXR: chest X-rays with reports, for those who have access to it."""
