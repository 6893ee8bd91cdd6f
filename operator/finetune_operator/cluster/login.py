"""How kopf reaches the API server. Knows nothing of what it watches."""

from __future__ import annotations

import dataclasses
import ssl
from typing import Any

import kopf


class ClusterConnection(kopf.ConnectionInfo):
    """Checks the API server's certificate as Kubernetes' own clients do.

    From Python 3.13 on, `ssl` also asks for the key identifiers of RFC 5280, which the authorities of older clusters lack.
    """

    def as_ssl_context(self) -> ssl.SSLContext:
        """The context of kopf's connections."""
        context = super().as_ssl_context()
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        return context


def login(**kwargs: Any) -> ClusterConnection | None:
    """As the pod's service account, or by KUBECONFIG."""
    found = kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)
    return ClusterConnection(**{field.name: getattr(found, field.name) for field in dataclasses.fields(found)}) if found else None
