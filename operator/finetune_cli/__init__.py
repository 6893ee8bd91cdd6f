"""`finetune`: validate a manifest, run it on this machine, watch it in a cluster."""
