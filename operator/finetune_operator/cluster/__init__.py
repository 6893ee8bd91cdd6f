"""The only place that talks to the API server: read, apply, create, delete, status, events, token reviews."""
