"""PURE: a job -> the manifests of its ConfigMap, Service, Pods, Jobs and claim, as plain dicts."""
