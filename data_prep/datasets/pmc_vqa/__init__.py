"""PMC-VQA: multiple-choice questions about figures of open-access articles."""
