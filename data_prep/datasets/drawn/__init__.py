"""What the drawn data sets (phantom, shapes, shapes_easy) share."""
