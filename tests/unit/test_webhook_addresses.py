from __future__ import annotations

import pytest

from core.errors import InvalidInput
from core.webhooks.addresses import check_url, is_allowed

PUBLIC = ("93.184.216.34", "8.8.8.8", "172.15.0.1", "172.32.0.1", "100.128.0.1", "223.255.255.1")
PUBLIC_IPV6 = ("2606:2800:220:1::1", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8")
LOCAL = (
    *("127.0.0.1", "127.255.0.9", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
    *("100.64.0.1", "100.127.255.255", "::1", "fc00::1", "fd12:3456::1"),
    # IPv4 addresses in IPv6 clothes.
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b::7f00:1"),
)
UNUSABLE = (
    *("0.0.0.0", "0.1.2.3", "169.254.169.254", "192.0.0.8", "192.0.2.1", "192.88.99.1"),
    *("198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1"),
    *("255.255.255.255", "::", "fe80::1", "fe80::1%eth0", "2606:2800:220:1::1%eth0", "ff02::1"),
    *("fec0::1", "100::1", "64:ff9b:1::1", "2001:db8::1", "3fff::1", "2001:2::1", "2001:10::1"),
    # Compatible, 6to4 and Teredo addresses, whatever IPv4 address they hold.
    *("::10.0.0.1", "::8.8.8.8", "2002:0a00:0001::1", "2002:808:808::1"),
    *("2001:0:4136:e378:8000:63bf:f5ff:fffe", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe"),
    *("::ffff:0.0.0.0", "", "localhost", "127.1", "0x7f.0.0.1", "2130706433"),
)


@pytest.mark.parametrize("address", [*PUBLIC, *PUBLIC_IPV6])
def test_public_addresses_are_called(address: str) -> None:
    assert is_allowed(address, allow_private=False)
    assert is_allowed(address, allow_private=True)


@pytest.mark.parametrize("address", LOCAL)
def test_local_addresses_are_called_only_if_the_operator_allows_it(address: str) -> None:
    assert not is_allowed(address, allow_private=False)
    assert is_allowed(address, allow_private=True)


@pytest.mark.parametrize("address", UNUSABLE)
def test_addresses_that_no_receiver_can_have_are_never_called(address: str) -> None:
    assert not is_allowed(address, allow_private=False)
    assert not is_allowed(address, allow_private=True)


@pytest.mark.parametrize(
    ("url", "stored"),
    [
        ("https://example.com/hook", "https://example.com/hook"),
        ("HTTPS://Example.COM", "https://example.com"),
        ("https://example.com:8443/a?b=c", "https://example.com:8443/a?b=c"),
        ("https://bücher.example/", "https://xn--bcher-kva.example/"),
        ("https://93.184.216.34/x", "https://93.184.216.34/x"),
        ("https://[2606:2800:220:1::1]/x", "https://[2606:2800:220:1::1]/x"),
        ("https://my_hook.example.com/", "https://my_hook.example.com/"),
    ],
)
def test_urls_of_the_public_internet_are_accepted(url: str, stored: str) -> None:
    assert str(check_url(url, allow_private=False)) == stored


@pytest.mark.parametrize(
    "url",
    [
        *("", "example.com", "//example.com/x", "https://", "https:///x", "https:example.com"),
        *("ftp://example.com/", "file:///etc/passwd", "javascript:alert(1)"),
        *("https://user:secret@example.com/", "https://user@example.com/"),
        *("https://93.184.216.34\\@example.com/", "https://example.com/#part"),
        *("https://example.com:0/", "https://example.com:65536/", "https://example.com:-1/"),
        *("https://exa mple.com/", "https://ex%61mple.com/", "https://a..b/", "https://-a.b/"),
        *("https://example.com./", "https://exam\nple.com/", "https://[::1"),
        # Numbers that a resolver would take for 127.0.0.1.
        *("https://127.1/", "https://2130706433/", "https://0x7f000001/", "https://0177.0.0.1/"),
        *("https://127.0.0.0x1/", f"https://example.com/{'a' * 2048}"),
        f"https://{'a.' * 130}example.com/",
        "https://１２７.0.0.1/",
    ],
)
@pytest.mark.parametrize("allow_private", [False, True])
def test_what_is_no_url_of_a_receiver_is_refused(url: str, allow_private: bool) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_url(url, allow_private=allow_private)
    assert (caught.value.code, caught.value.field) == ("invalid_webhook_url", "url")


@pytest.mark.parametrize(
    "url",
    [
        *("https://localhost/", "https://LOCALHOST:8443/", "https://a.localhost/"),
        *("https://127.0.0.1/", "https://10.1.2.3/", "https://[::1]/", "https://[fd00::1]/"),
        "https://[::ffff:127.0.0.1]/",
    ],
)
def test_local_urls_are_refused_unless_allowed(url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_url(url, allow_private=False)
    assert (caught.value.code, caught.value.field) == ("webhook_address_refused", "url")
    check_url(url, allow_private=True)


@pytest.mark.parametrize(
    "url", ["http://localhost/", "http://10.0.0.1:80/", "https://h.example:22"]
)
def test_http_and_low_ports_are_for_private_networks(url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_url(url, allow_private=False)
    assert caught.value.code == "invalid_webhook_url"
    check_url(url, allow_private=True)


@pytest.mark.parametrize(
    "url", ["https://169.254.169.254/", "https://0.0.0.0/", "https://[::]/", "https://[::1%25lo]"]
)
def test_the_metadata_service_is_refused_even_where_private_addresses_are_allowed(url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_url(url, allow_private=True)
    assert caught.value.code == "webhook_address_refused"
