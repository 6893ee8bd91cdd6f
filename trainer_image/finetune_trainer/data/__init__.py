"""Rows: read them, know their format, check them, turn them into tokens and labels. Knows tokenizers, but no weights."""
