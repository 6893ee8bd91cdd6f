"""PURE: what is known of jobs, what they own, queues and nodes, as typed values. Knows no other room."""
