"""Any model behind an OpenAI-compatible server, through the same questions, controls and figures as ours.

templates  how a question is put into messages: a JSON file
pictures   images as they are sent
evaluator  asks, pass by pass, on `judge.client`
program    `evaluate --server`: sections of a config or a table, and where images may go
"""
