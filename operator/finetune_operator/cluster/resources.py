"""Where the kinds that the operator reads and writes live in the API. Knows nothing of what they hold."""

from __future__ import annotations

from dataclasses import dataclass

from finetune_api import GROUP, PLURAL, VERSION
from finetune_api.endpoint import ENDPOINT_KIND, ENDPOINT_PLURAL
from finetune_api.queue import QUEUE_KIND, QUEUE_PLURAL
from finetune_api.tuned_model import MODEL_KIND, MODEL_PLURAL


@dataclass(frozen=True)
class Resource:
    """Where a kind lives in the API."""

    kind: str
    plural: str
    group: str = ""
    version: str = "v1"

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """The request path of a collection, an object or a subresource."""
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        parts = [root, *(["namespaces", namespace] if namespace else []), self.plural, name, subresource]
        return "/".join(part for part in parts if part)


RESOURCES = {
    r.kind: r
    for r in (
        Resource("FineTuneJob", PLURAL, GROUP, VERSION),
        Resource("Pod", "pods"),
        Resource("Job", "jobs", "batch"),
        Resource("ConfigMap", "configmaps"),
        Resource("Service", "services"),
        Resource("EndpointSlice", "endpointslices", "discovery.k8s.io"),
        Resource("PersistentVolumeClaim", "persistentvolumeclaims"),
        Resource("Deployment", "deployments", "apps"),
        Resource("PodDisruptionBudget", "poddisruptionbudgets", "policy"),
        Resource("NetworkPolicy", "networkpolicies", "networking.k8s.io"),
        Resource("Event", "events"),
        Resource("Secret", "secrets"),
        Resource(QUEUE_KIND, QUEUE_PLURAL, GROUP, VERSION),
        Resource(MODEL_KIND, MODEL_PLURAL, GROUP, VERSION),
        Resource(ENDPOINT_KIND, ENDPOINT_PLURAL, GROUP, VERSION),
        Resource("Node", "nodes"),
        Resource("Namespace", "namespaces"),
        Resource("PriorityClass", "priorityclasses", "scheduling.k8s.io"),
        Resource("Lease", "leases", "coordination.k8s.io"),
        Resource("Workload", "workloads", "kueue.x-k8s.io", "v1beta2"),
        Resource("PodGroup", "podgroups", "scheduling.volcano.sh", "v1beta1"),
        Resource("ValidatingWebhookConfiguration", "validatingwebhookconfigurations", "admissionregistration.k8s.io"),
        Resource("MutatingWebhookConfiguration", "mutatingwebhookconfigurations", "admissionregistration.k8s.io"),
        Resource("TokenReview", "tokenreviews", "authentication.k8s.io"),
        Resource("SubjectAccessReview", "subjectaccessreviews", "authorization.k8s.io"),
    )
}
RESOURCES["Workload/v1beta1"] = Resource("Workload", "workloads", "kueue.x-k8s.io", "v1beta1")


def plural_of(kind: str) -> str:
    """A kind's plural as RBAC and kubectl write it: nodes, finetunequeues.finetune.dev."""
    resource = RESOURCES[kind]
    return f"{resource.plural}.{resource.group}" if resource.group else resource.plural
