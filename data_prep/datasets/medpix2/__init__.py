"""MedPix 2.0: CT and MR images with descriptions and cases."""
