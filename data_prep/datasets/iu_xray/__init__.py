"""Indiana University's chest X-rays with their reports (Open-i), in the three layouts in use."""
