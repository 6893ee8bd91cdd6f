"""The operator trusts the API server as Kubernetes' own clients do, and what it serves satisfies the strictest of its own."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
from pathlib import Path

import kopf
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from finetune_operator.cluster.login import ClusterConnection
from finetune_operator.servers.certificate import Certificate, generate

NOW = datetime.datetime.now(datetime.UTC)


def _signed_without_identifiers() -> tuple[str, Certificate]:
    """(authority, certificate that it signed), as clusters of some years ago have them."""
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("authority", "localhost")]
    found = []
    for subject, key, is_authority in ((names[0], keys[0], True), (names[1], keys[1], False)):
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(names[0]).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(NOW - datetime.timedelta(days=1))
        builder = builder.not_valid_after(NOW + datetime.timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        found.append(builder.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode())
    pem = keys[1].private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode()
    return found[0], Certificate(found[1], pem)


def _shake_hands(server: Certificate, client: ssl.SSLContext) -> None:
    """One TLS handshake on this machine. Raises ssl.SSLError where the client does not trust the server."""
    left, right = socket.socketpair()

    def serve() -> None:
        try:
            server.ssl_context().wrap_socket(left, server_side=True).close()
        except (ssl.SSLError, OSError):
            left.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        client.wrap_socket(right, server_hostname="localhost").close()
    finally:
        right.close()
        thread.join(10)


def test_an_authority_without_identifiers_is_trusted(tmp_path: Path) -> None:
    authority, certificate = _signed_without_identifiers()
    (tmp_path / "ca.crt").write_text(authority)
    strict = ssl.create_default_context(cadata=authority)
    strict.verify_flags |= ssl.VERIFY_X509_STRICT  # Python's default from 3.13 on
    with pytest.raises(ssl.SSLError, match="Identifier"):
        _shake_hands(certificate, strict)
    connection = ClusterConnection(server="https://localhost", ca_path=str(tmp_path / "ca.crt"))
    assert isinstance(connection, kopf.ConnectionInfo)
    _shake_hands(certificate, connection.as_ssl_context())
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        _shake_hands(generate(["localhost"], NOW), connection.as_ssl_context())


def test_what_the_operator_serves_satisfies_strict_clients() -> None:
    own = generate(["localhost"], NOW)
    strict = ssl.create_default_context(cadata=own.certificate)
    strict.verify_flags |= ssl.VERIFY_X509_STRICT
    _shake_hands(own, strict)
