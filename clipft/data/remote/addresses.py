"""Addresses of shards that lie elsewhere: which there are, and how they are said without what is secret in them."""

import ipaddress
import os
import re
import shlex
from collections.abc import Collection
from urllib.parse import urlsplit

from clipft.data.sample import printable

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
"""Scheme -> the package by which fsspec reads it."""
SCHEMES = ("https", "http", *PACKAGES)
PIPE = "pipe:"
ALLOW_PIPE = "CLIPFT_ALLOW_PIPE"  # set by the command line alone; the processes that it starts inherit it
SECRET = re.compile(r"[?&;]([^=&;\s]*(?:sig|token|secret|passw|credential|key)[^=&;\s]*)=", re.IGNORECASE)
USER = re.compile(r"://[^/@\s]*@")
SHELL = {"|", "||", "&", "&&", ";", ">", ">>", "<", "2>&1"}  # a shell's words for what it does itself
NAT64, NAT64_LOCAL = ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48")


def is_remote(text: str) -> bool:
    """Whether it is an address, or a command whose output is a shard, and no path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:", text) is not None


def scheme_of(address: str) -> str:
    return address.partition(":")[0].lower()


def shown(address: str) -> str:
    """The address for messages: without user, password and query; of a command the program and the shard."""
    if address.startswith(PIPE):
        words = words_of(address)
        return printable(f"{PIPE}{os.path.basename(words[0])} ... {name_of(address)}" if words else PIPE)
    return printable(re.sub(r"\?.*", "?...", USER.sub("://", address)))


def name_of(address: str) -> str:
    """The shard's file name; of a command the last of its words that ends in one."""
    if not address.startswith(PIPE):
        return os.path.basename(urlsplit(address).path)
    names = [os.path.basename(urlsplit(word).path) for word in words_of(address)]
    return next((name for name in reversed(names) if name.endswith(".tar")), "pipe.tar")


def words_of(address: str) -> list[str]:
    """Program and arguments of a pipe: address, as they are handed over; a quote that is not closed raises."""
    return shlex.split(address.removeprefix(PIPE))


def beside(address: str, name: str) -> str:
    """The address of a file in the same folder."""
    return folder_of(address) + name


def folder_of(address: str) -> str:
    """The address of the folder that the file is in, with a slash at its end."""
    return address.partition("?")[0].rpartition("/")[0] + "/"


def refuse_secrets(key: str, text: str) -> None:
    """Raises for an address with a password or token in it, which would stand in the run's config.yaml and in logs."""
    secret = SECRET.search(text)
    if USER.search(text) or secret:
        what = "a user or password" if secret is None else f"a secret ({secret[1]}=)"
        safe = re.sub(r"\?\S*", "?...", USER.sub("://", text))
        raise ValueError(
            f"{key}: {printable(safe)} has {what} in it, which would be written into the run's config and logs. Leave "
            "it out, and give it where it is looked for: ~/.netrc for https, the credentials of AWS and Google for s3 "
            "and gs, HF_TOKEN for hf."
        )


def check_address(key: str, text: str, allow_pipe: bool) -> None:
    """Raises for an address that cannot be read here, with what to do; nothing is asked over the network."""
    refuse_secrets(key, text)
    if text.startswith(PIPE):
        return check_pipe(key, text, allow_pipe)
    scheme = scheme_of(text)
    if scheme not in SCHEMES:
        raise ValueError(f"{key}={shown(text)}: {scheme}:// is not read. Use one of {', '.join(SCHEMES)}, or a path.")
    if scheme in PACKAGES:
        import fsspec

        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            package = PACKAGES[scheme]
            raise ValueError(f"{key}={shown(text)} needs {package}: pip install {package}") from error


def check_pipe(key: str, text: str, allow_pipe: bool) -> None:
    """Raises unless the config and the command line allow commands, and for what only a shell would do."""
    if not allow_pipe or ALLOW_PIPE not in os.environ:
        raise ValueError(
            f"{key} names a command (pipe:), and a config that can run commands can do anything. If you wrote it "
            "yourself, add data.allow_pipe=true to the command line; in a YAML file it is not heard."
        )
    try:
        words = words_of(text)
    except ValueError as error:
        raise ValueError(f"{key}: the command behind pipe: has a quote that is not closed.") from error
    if not words or SHELL & set(words):
        found = ", ".join(sorted(SHELL & set(words))) or "no program"
        raise ValueError(
            f"{key}: the command behind pipe: has {found}. It is started without a shell, with its words as they "
            "are: put more than one program into a script."
        )


def is_public(address: str) -> bool:
    """Whether an IP address is reached over the open internet: not private, loopback, link-local or reserved."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, ip.teredo[1] if ip.teredo else None]
        inner += [ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)] if ip in NAT64 else []
        hidden = [each for each in inner if each is not None]
        if hidden or ip in NAT64_LOCAL:
            return bool(hidden) and all(is_public(str(each)) for each in hidden)
    return ip.is_global and not ip.is_multicast


def refused_redirect(before: str, after: str, own: Collection[str], theirs: Collection[str]) -> str:
    """Why a redirect is not followed; "" where it is. `own` are the IP addresses of the host that the user named.

    A server could otherwise make this machine ask others that only it can reach, such as a cloud's metadata.
    """
    if scheme_of(after) not in ("http", "https"):
        return f"a redirect to {scheme_of(after)}:"
    if scheme_of(before) == "https" and scheme_of(after) == "http":
        return "a redirect from https to http"
    hidden = next((address for address in theirs if not is_public(address) and address not in own), None)
    return f"a redirect to {shown(after)}, which is at the private address {hidden}" if hidden else ""
