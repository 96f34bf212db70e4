"""PathVQA: questions about pathology images from two textbooks and a digital library."""
