"""Rows of one person out of what jobs and models keep."""
