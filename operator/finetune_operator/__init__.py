"""The operator: kopf delivers events, `reconcile` decides, `cluster` acts."""
