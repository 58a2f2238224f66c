"""Which addresses a picture may be fetched from: public ones, and private ones that a run file allows."""

import ipaddress

from jest_core.run_file.ingest import network_of

PRIVATE, METADATA = "address of a private network", "address of a cloud's metadata"  # why an address is refused
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Where clouds answer their machines with credentials; of AWS, Azure, Google, Alibaba and Oracle
_METADATA = [
    ipaddress.ip_network(network)
    for network in (
        "169.254.0.0/16",
        "fe80::/10",
        "fd00:ec2::/32",
        "fd20:ce::/32",
        "168.63.129.16",
        "100.100.100.200",
        "192.0.0.192",
    )
]
# Of what Python counts as global: protocols' own addresses, relays, and prefixes that stand for IPv4 addresses
_NOT_PUBLIC = [
    ipaddress.ip_network(network)
    for network in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2002::/16", "3fff::/20")
]
_UNICAST = ipaddress.ip_network("2000::/3")  # all that IANA gave out of IPv6 as public
# IPv6 networks whose addresses stand for IPv4 addresses, and the number of bits below these
_EMBEDDING = [
    (ipaddress.IPv6Network(network), bits)
    for network, bits in (
        ("::/96", 0),
        ("::ffff:0:0/96", 0),
        ("::ffff:0:0:0/96", 0),
        ("64:ff9b::/96", 0),
        ("64:ff9b:1::/48", 0),
        ("2002::/16", 80),
    )
]


def refusal(address: str, host: str, private: bool | list[str]) -> str | None:
    """Why no picture may be fetched from an address; None where it may. host: whose address it is. private:
    ingest.private_addresses, which opens no address of metadata.

    An IPv6 address that stands for an IPv4 address counts as both.
    """
    given = ipaddress.ip_address(address)
    both = [given, *_embedded(given)]
    if any(one in network for one in both for network in _METADATA):
        return METADATA
    if private is True or _is_public(given):
        return None
    for entry in private or []:
        network = network_of(entry)
        if entry.lower() == host.lower() if network is None else any(one in network for one in both):
            return None
    return PRIVATE


def _is_public(address: Address) -> bool:
    if address.version == 6 and address not in _UNICAST:
        return False
    return address.is_global and not address.is_multicast and not any(address in network for network in _NOT_PUBLIC)


def _embedded(address: Address) -> list[Address]:
    """The IPv4 addresses that an IPv6 address stands for."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    bits = [bits for network, bits in _EMBEDDING if address in network]
    return [*(address.teredo or ()), *(ipaddress.IPv4Address(int(address) >> n & 0xFFFFFFFF) for n in bits)]
