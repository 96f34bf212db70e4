"""What evaluators share: controls, and the files of an evaluation."""
