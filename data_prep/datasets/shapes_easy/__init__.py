"""The first lesson of the tiny base model: one shape on a plain ground, described."""
