"""ImageCLEFmedical Caption: the challenge's captions and concepts, of a year."""
