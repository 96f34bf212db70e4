"""VinDr-CXR: boxes that radiologists drew around findings, and other sets of boxes in COCO's form."""
