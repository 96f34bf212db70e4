"""MedXpertQA: hard questions with five choices, many about several images."""
