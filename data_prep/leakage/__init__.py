"""What built data sets have in common: images by content and by look, ids of MedPix and of articles, questions."""
