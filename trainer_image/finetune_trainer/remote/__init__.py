"""Hubs and servers of others: asked with patience. Knows nothing of what is asked for."""
