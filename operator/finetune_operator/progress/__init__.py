"""The endpoint that training pods report to, and the memory behind it."""
