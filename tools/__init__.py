"""Programs around the library, each with a `--help`.

A package with this file, not a namespace: one called tools elsewhere on the path, however far behind, would come first.
"""
