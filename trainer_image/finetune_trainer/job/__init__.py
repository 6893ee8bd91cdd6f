"""The job and its workspace, as every room sees them."""
