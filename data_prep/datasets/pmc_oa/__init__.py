"""PMC-OA: figures of open-access articles with captions, the first stage of systems that go on to PMC-VQA."""
