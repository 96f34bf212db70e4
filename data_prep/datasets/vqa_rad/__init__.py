"""VQA-RAD: clinicians' questions about 315 radiological images, in either of its two layouts."""
