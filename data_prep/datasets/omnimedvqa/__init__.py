"""OmniMedVQA: multiple-choice questions made from the labels of 73 data sets of images."""
