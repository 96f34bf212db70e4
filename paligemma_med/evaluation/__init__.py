"""What evaluators share: controls, scoring of options, and the files of an evaluation."""
