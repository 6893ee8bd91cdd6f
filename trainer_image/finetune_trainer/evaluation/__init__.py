"""The evaluate stage: what is measured, and whether it is enough."""
