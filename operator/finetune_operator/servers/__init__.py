"""What others ask of the operator: probes, progress, webhooks. They read the cache, and controllers do not know them."""
