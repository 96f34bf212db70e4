"""The loop: rows → units → journal ← backend; then the journal → files."""

# journal = journal.open_journal(path)           B: .replies(key), .score(key), .add_many(records)
# local.answer(units, journal, ...)              A
# server.answer(units, journal, model=..., ...)  B
# write.write(units, journal, output, config, about=about, books=books) -> report      C
#   units: iterable in source order; journal: .replies(key); books: dict for the report ("source")
