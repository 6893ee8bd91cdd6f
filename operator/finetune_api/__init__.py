"""The finetune.dev/v1alpha1 API: resource types, defaults, validation, and the contract with the trainer.

Everything here is pure: no I/O, no Kubernetes client, no torch. Both the operator and the trainer import it.
"""

GROUP = "finetune.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"
