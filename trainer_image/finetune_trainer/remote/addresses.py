"""Which hosts a user's address may lead to. Knows nothing of what is fetched from them."""

from __future__ import annotations

import ipaddress
import os
import socket

from finetune_api.contract import Env

from ..process.errors import UserError
from .retry import host_unavailable


def is_allowed(host: str) -> bool:
    """Whether an administrator named the host."""
    return host in os.environ.get(Env.ALLOWED_HOSTS, "").split(",")


def allowed_addresses(host: str, port: int) -> list[str]:
    """Addresses of a host that may be connected to. Raises UserError when it has one that is not public."""
    try:
        found = sorted({str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
    except OSError as failure:
        raise host_unavailable(host, f"has no address: {failure}") from failure
    if is_allowed(host):
        return found
    hidden = [address for address in found if not ipaddress.ip_address(address.partition("%")[0]).is_global]
    if hidden:
        raise UserError(
            "AddressNotAllowed",
            f"{host} has the address {hidden[0]}, which is not public; name another, or ask an administrator to allow the host",
        )
    return found
