"""The whole evaluation of any model against a reference. Read __main__.py first."""
