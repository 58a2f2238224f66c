import pytest

from pipelines.data.addresses import METADATA, PRIVATE, refusal

PUBLIC = ["8.8.8.8", "93.184.216.34", "1.1.1.1", "2606:4700::6810:84e5", "2a00:1450:4001:82a::200e"]
NOT_PUBLIC = [
    *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1", "0.0.0.0", "0.1.2.3", "255.255.255.255"),
    *("192.0.0.8", "192.88.99.1", "198.18.0.1", "203.0.113.5", "224.0.0.1", "239.1.1.1", "240.0.0.1"),
    *("::", "::1", "::127.0.0.1", "::8.8.8.8", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:0:127.0.0.1"),
    *("2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::7f00:1", "64:ff9b:1:2:3:4:7f00:1"),
    *("2001:0:7f00:1::", "2001:db8::1", "3fff::1", "fc00::1", "fd12::1", "fec0::1", "ff02::1", "5f00::1", "100::1"),
]
OF_METADATA = [
    *("169.254.169.254", "169.254.170.2", "168.63.129.16", "100.100.100.200", "192.0.0.192"),
    *("fe80::1", "fe80::a9fe:a9fe%eth0", "fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254"),
    *("::ffff:169.254.169.254", "::169.254.169.254", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a9fe:a9fe", "2002:a9fe:a9fe::"),
    "2001:0:a9fe:a9fe::",  # Teredo's server
    f"2001:0:808:808:0:0:{0xA9FE ^ 0xFFFF:x}:{0xA9FE ^ 0xFFFF:x}",  # Teredo's client, whose bits are inverted
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_not_refused(address: str):
    assert refusal(address, "x", False) is None
    assert refusal(address, "x", ["10.0.0.0/8"]) is None


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_all_others_are_private_and_may_be_allowed(address: str):
    assert refusal(address, "x", False) == PRIVATE
    assert refusal(address, "x", True) is None
    assert refusal(address, "x", [address]) is None


@pytest.mark.parametrize("address", OF_METADATA)
def test_nothing_opens_the_metadata_of_a_cloud(address: str):
    for private in (False, True, [address.partition("%")[0], "x", "0.0.0.0/0", "::/0"]):
        assert refusal(address, "x", private) == METADATA


def test_networks_and_hosts_are_allowed_one_by_one():
    allowed = ["10.20.0.0/16", "fd12::/64", "Images.Intranet", "::1"]
    for address in ("10.20.3.4", "fd12::7", "::ffff:10.20.3.4", "64:ff9b::a14:304", "::1"):
        assert refusal(address, "x", allowed) is None
    for address in ("10.21.0.1", "fd12:1::7", "127.0.0.1"):
        assert refusal(address, "x", allowed) == PRIVATE
        assert refusal(address, "images.intranet", allowed) is None
