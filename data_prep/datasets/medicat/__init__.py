"""MedICaT: figures of medical articles with captions and the places in the text that refer to them."""
