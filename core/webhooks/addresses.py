"""Which addresses a webhook may have: those of the public internet, unless more are allowed.

A name proves nothing: its owner decides what it resolves to, and can change that at any moment. So
a URL is checked for what is plainly wrong when it is stored, and the addresses that its name
resolves to are checked at every delivery, which then connects to what was checked.
"""

from __future__ import annotations

import ipaddress
import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import NoReturn

import httpx2

from core.errors import InvalidInput

_MAX_URL = 2048
_HOST = re.compile(
    r"(?=.{1,253}$)([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*"
)
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*")
_FIRST_UNPRIVILEGED_PORT = 1024

# What the IANA registries of special-purpose addresses do not call globally reachable. They are
# listed here since what `ipaddress` calls global differs between versions of Python.
_LOCAL_IPV4 = tuple(
    IPv4Network(network)
    for network in ("10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")
)
_UNUSABLE_IPV4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",
        # Link-local; the metadata service of most clouds is there.
        "169.254.0.0/16",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        # Multicast, reserved, broadcast.
        "224.0.0.0/3",
    )
)
_LOCAL_IPV6 = (IPv6Network("::1/128"), IPv6Network("fc00::/7"))
_GLOBAL_IPV6 = IPv6Network("2000::/3")
_UNUSABLE_IPV6 = tuple(
    IPv6Network(network)
    for network in (
        # Protocol assignments, Teredo among them.
        "2001::/23",
        "2001:db8::/32",
        # 6to4, which leads to the IPv4 address inside.
        "2002::/16",
        "3fff::/20",
    )
)
_MAPPED = IPv6Network("::ffff:0:0/96")
_NAT64 = IPv6Network("64:ff9b::/96")


def check_url(url: str, *, allow_private: bool) -> httpx2.URL:
    """Return a webhook's URL, refusing what can be seen to be wrong without asking anybody.

    Args:
        url: What the owner gave.
        allow_private: Also allow http, any port, and private and loopback addresses.

    Raises:
        InvalidInput: Code `invalid_webhook_url`, or `webhook_address_refused` for an address that
            the service does not call.
    """
    if not 1 <= len(url) <= _MAX_URL:
        _invalid(f"the URL has more than {_MAX_URL} characters" if url else "the URL is empty")
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        _invalid(f"the URL cannot be read: {error}")
    if len(str(parsed)) > _MAX_URL:
        _invalid(f"the URL, encoded, has more than {_MAX_URL} characters")
    schemes = ("https", "http") if allow_private else ("https",)
    if parsed.scheme not in schemes:
        _invalid(f"the URL does not begin with {' or '.join(f'{name}://' for name in schemes)}")
    if parsed.userinfo:
        _invalid("the URL holds credentials", "Messages are signed; check the signature instead.")
    if parsed.fragment:
        _invalid("the URL has a fragment, which is never sent")
    _check_port(parsed.port, allow_private)
    _check_host(parsed.raw_host.decode("ascii"), allow_private)
    return parsed


def is_allowed(address: str, *, allow_private: bool) -> bool:
    """Tell whether the service may connect to an IP address.

    Args:
        address: In text form; an IPv6 address that stands for an IPv4 address is judged as that.
        allow_private: Allow private and loopback addresses; link-local ones, multicast and what
            cannot be a receiver stay refused.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, IPv6Address):
        if parsed.scope_id is not None:
            return False
        if parsed not in _MAPPED and parsed not in _NAT64:
            return _is_allowed_ipv6(parsed, allow_private)
        parsed = IPv4Address(int(parsed) & 0xFFFF_FFFF)
    if any(parsed in network for network in _LOCAL_IPV4):
        return allow_private
    return not any(parsed in network for network in _UNUSABLE_IPV4)


def _is_allowed_ipv6(address: IPv6Address, allow_private: bool) -> bool:
    if any(address in network for network in _LOCAL_IPV6):
        return allow_private
    return address in _GLOBAL_IPV6 and not any(address in network for network in _UNUSABLE_IPV6)


def _check_port(port: int | None, allow_private: bool) -> None:
    if port is None:
        return
    lowest = 1 if allow_private else _FIRST_UNPRIVILEGED_PORT
    if port != 443 and not lowest <= port <= 65_535:
        _invalid(f"port {port} is not one that webhooks are sent to", "Use 443 or one above 1023.")


def _check_host(host: str, allow_private: bool) -> None:
    literal = ":" in host or _NUMBER.fullmatch(host.rsplit(".", 1)[-1]) is not None
    if literal:
        # A last label that is a number makes the whole an address, in forms that `ipaddress`
        # does not read but a resolver does: 127.1, 0x7f000001.
        try:
            ipaddress.ip_address(host)
        except ValueError:
            _invalid(f"{host!r} is not an IP address")
        if not is_allowed(host, allow_private=allow_private):
            _refuse(host)
    elif not _HOST.fullmatch(host):
        _invalid(f"{host!r} is not the name of a host")
    elif (host == "localhost" or host.endswith(".localhost")) and not allow_private:
        _refuse(host)


def _invalid(message: str, hint: str = "For example https://example.com/tunesmith.") -> NoReturn:
    raise InvalidInput(message, code="invalid_webhook_url", field="url", hint=hint)


def _refuse(host: str) -> NoReturn:
    raise InvalidInput(
        f"{host!r} is not on the public internet",
        code="webhook_address_refused",
        field="url",
        hint="The operator can allow private addresses with TUNESMITH_WEBHOOK_ALLOW_PRIVATE.",
    )
