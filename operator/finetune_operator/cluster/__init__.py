"""The API server: requests, watches, the lease. Knows nothing of what is decided."""
