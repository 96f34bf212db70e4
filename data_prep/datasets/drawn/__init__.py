"""What the drawn data sets (phantom, shapes, shapes_easy, shapes_words) share."""
