"""VQA-RAD: clinicians' questions about 315 radiological images, in both layouts it is found in."""
