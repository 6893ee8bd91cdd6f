"""The progress endpoint's certificate: made by the operator, kept in a Secret, renewed in time."""

from __future__ import annotations

import base64
import ssl
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..cluster.client import APIError, KubernetesCluster
from ..settings import Settings

_LIFETIME, _RENEW_BEFORE = timedelta(days=3650), timedelta(days=365)


@dataclass(frozen=True)
class Certificate:
    """PEM texts. The certificate is its own authority: pods trust it and nothing else."""

    certificate: str
    key: str

    def ssl_context(self) -> ssl.SSLContext:
        """Server side, TLS 1.2 or later."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        with tempfile.TemporaryDirectory() as folder:  # ssl reads keys from files only
            pem = Path(folder, "tls.pem")
            pem.touch(mode=0o600)
            pem.write_text(self.key + self.certificate)
            context.load_cert_chain(pem)
        return context

    def fits(self, hosts: list[str], now: datetime) -> bool:
        """Whether it names the hosts and will not expire soon."""
        try:
            parsed = x509.load_pem_x509_certificate(self.certificate.encode())
            names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (ValueError, x509.ExtensionNotFound):
            return False
        return parsed.not_valid_after_utc - now > _RENEW_BEFORE and set(hosts) <= set(names.get_values_for_type(x509.DNSName))


def generate(hosts: list[str], now: datetime) -> Certificate:
    """A new self-signed certificate for the hosts."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "finetune-operator progress")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + _LIFETIME)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.KeyUsage(True, False, False, False, False, True, False, False, False), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Certificate(certificate.public_bytes(serialization.Encoding.PEM).decode(), private.decode())


def hosts_of(settings: Settings) -> list[str]:
    """Names that pods may reach the endpoint by."""
    service, namespace = settings.service_name, settings.namespace
    return [f"{service}.{namespace}.svc", f"{service}.{namespace}.svc.cluster.local", "localhost"]


async def ensure(cluster: KubernetesCluster, settings: Settings) -> Certificate:
    """The certificate in the chart's Secret; made or renewed when needed. Without a Secret, a new one.

    Several operators may start at once: the write is conditional, and who loses takes the winner's.
    """
    hosts, now = hosts_of(settings), datetime.now(UTC)
    if not settings.tls_secret:
        return generate(hosts, now)
    while True:
        secret = await cluster.get("Secret", settings.namespace, settings.tls_secret)
        data = {k: base64.b64decode(v).decode(errors="replace") for k, v in (secret.get("data") or {}).items()}
        known = Certificate(data.get("tls.crt", ""), data.get("tls.key", ""))
        if known.fits(hosts, now):
            return known
        new = generate(hosts, now)
        secret["data"] = {
            "tls.crt": base64.b64encode(new.certificate.encode()).decode(),
            "tls.key": base64.b64encode(new.key.encode()).decode(),
        }
        try:
            await cluster.replace({"apiVersion": "v1", "kind": "Secret", **secret})
        except APIError as failure:
            if not failure.conflict:
                raise
            continue
        return new
