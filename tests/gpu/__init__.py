"""`make gpu`: the stages on a GPU, measured. Runs with the Python at hand, without Kubernetes and without a network."""
