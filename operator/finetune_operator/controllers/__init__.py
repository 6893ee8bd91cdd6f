"""The loops: a key comes, what it names is observed, decided about, and written."""
