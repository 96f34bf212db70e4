"""ROCOv2: radiological images of open-access articles, captions, UMLS concepts."""
