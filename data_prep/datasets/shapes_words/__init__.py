"""The third lesson of the tiny base model: words to say, among questions about shapes."""
