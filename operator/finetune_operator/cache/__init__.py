"""What was seen of the cluster, kept up by events. Knows nothing of how it came, and writes nothing."""
