"""What evaluators share: the class they derive from, a split's questions, controls, and the files.

evaluator  how a batch is asked, the controls that are texts, and `run`
questions  what a row must hold, and what is known of it before it is asked
controls   answers that need no image, and other images
results    the files of an evaluation, and how one that was killed continues
"""
