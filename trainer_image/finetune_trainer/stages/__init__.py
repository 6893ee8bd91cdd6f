"""The stages, each read top to bottom: prepare, check, train (with its worker), evaluate, publish. They import the rooms, no room imports them."""
