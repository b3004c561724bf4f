import sys
import urllib.request
from base64 import b64encode
from pathlib import Path
from urllib.error import HTTPError

import pytest
from flaky import site

from clipft.cli import main
from clipft.data.remote.addresses import check_address, is_public, is_remote, name_of, refused_redirect, shown
from clipft.data.remote.body import Fault
from clipft.data.remote.http import authorization, opener


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        ("2002:0808:0808::1", True),  # 6to4 of 8.8.8.8
        ("64:ff9b::808:808", True),  # NAT64 of 8.8.8.8
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("127.0.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::1", False),  # 6to4 of 127.0.0.1
        ("64:ff9b::a00:1", False),  # NAT64 of 10.0.0.1
        ("64:ff9b:1::1", False),
    ],
)
def test_an_address_is_public_or_reached_from_here_alone(address: str, public: bool):
    assert is_public(address) is public


@pytest.mark.parametrize(
    ("before", "after", "own", "theirs", "says"),
    [
        ("https://a.org/x", "https://b.org/x", {"8.8.8.8"}, {"9.9.9.9"}, ""),
        ("http://a.org/x", "https://b.org/x", {"8.8.8.8"}, {"9.9.9.9"}, ""),
        ("https://a.org/x", "http://b.org/x", {"8.8.8.8"}, {"9.9.9.9"}, "from https to http"),
        ("http://a.org/x", "http://b.org/x", {"8.8.8.8"}, {"10.0.0.1"}, "private address 10.0.0.1"),
        ("http://a.org/x", "http://b.org/x", {"8.8.8.8"}, {"9.9.9.9", "::1"}, "private address ::1"),
        ("http://lan/x", "http://lan:81/y", {"10.0.0.1"}, {"10.0.0.1"}, ""),
        ("http://lan/x", "http://other/y", {"10.0.0.1"}, {"10.0.0.2"}, "private address 10.0.0.2"),
        ("http://lan/x", "https://b.org/x", {"10.0.0.1"}, {"9.9.9.9"}, ""),
        ("http://a.org/x", "gopher://b.org/x", {"8.8.8.8"}, {"9.9.9.9"}, "to gopher:"),
    ],
)
def test_a_redirect_leads_to_public_hosts_or_to_the_one_that_was_named(before, after, own, theirs, says):
    why = refused_redirect(before, after, own, theirs)
    assert says in why and bool(why) is bool(says)


def test_a_name_that_gets_a_private_address_after_it_was_looked_up_is_not_asked(tmp_path: Path):
    with site(tmp_path) as web:
        with pytest.raises(Fault, match=r"private address 127\.0\.0\.1"):
            opener(web.url, set()).open(urllib.request.Request(web.url), timeout=5)
        assert web.asked == []
        with pytest.raises(HTTPError, match="404"):
            opener(web.url, {"127.0.0.1"}).open(urllib.request.Request(web.url), timeout=5)


@pytest.mark.parametrize(
    ("address", "said", "name"),
    [
        ("https://h.org/a/x-0.tar", "https://h.org/a/x-0.tar", "x-0.tar"),
        ("https://me:word@h.org/x.tar?sig=1&b=2", "https://h.org/x.tar?...", "x.tar"),
        ("s3://KEY:SECRET@bucket/a/x.tar", "s3://bucket/a/x.tar", "x.tar"),
        ("pipe:aws s3 cp --key SECRET s3://b/x-1.tar -", "pipe:aws ... x-1.tar", "x-1.tar"),
        ("pipe:/opt/make 'a b'", "pipe:make ... pipe.tar", "pipe.tar"),
        ("https://h.org/\x1b[31m.tar", r"https://h.org/\x1b[31m.tar", "\x1b[31m.tar"),
    ],
)
def test_addresses_are_said_without_what_may_be_secret(address: str, said: str, name: str):
    assert (shown(address), name_of(address)) == (said, name) and is_remote(address)


def test_paths_are_no_addresses():
    assert not any(map(is_remote, ["a/b.tar", "/a:b.tar", "C:\\x.tar", "./pipe/x.tar", "~/x-{0..1}.tar"]))


@pytest.mark.parametrize(
    "text",
    [
        "https://me:hidden@h.org/x.tar",
        "s3://hidden:hidden@bucket/x.tar",
        "https://h.org/x.tar?X-Amz-Signature=hidden",
        "https://h.org/x.tar?a=1&access_token=hidden",
        "pipe:curl https://me:hidden@h.org/x.tar",
    ],
)
def test_an_address_with_a_secret_is_refused_before_it_is_written_anywhere(tmp_path, monkeypatch, capsys, text: str):
    monkeypatch.chdir(tmp_path)
    for arguments in ([f"data.train={text}"], [f"data={text}"], [f"data={text}", "--cfg", "job"]):
        assert main(["train", "model=tiny", "model.pretrained=null", *arguments]) == 2
        out = capsys.readouterr()
        assert "has a" in out.err and "netrc" in out.err and "hidden" not in out.out + out.err
    folder = tmp_path / "conf/data"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(f"train: '{text}'\n")
    assert main(["train", "model=tiny", "model.pretrained=null", "data=mine"]) == 2
    assert "hidden" not in capsys.readouterr().err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ftp://h.org/x.tar", r"ftp:// is not read\. Use one of https, http, s3, gs, gcs, hf"),
        ("file:///x.tar", "file:// is not read"),
        ("s3://bucket/x-{0..3}.tar", "needs s3fs: pip install s3fs"),
        ("gs://bucket/x.tar", "needs gcsfs: pip install gcsfs"),
    ],
)
def test_a_store_that_cannot_be_read_here_is_refused_with_what_to_install(text: str, says: str):
    if text.startswith(("s3", "gs")) and (package := says.split()[1].rstrip(":")):
        assert package not in sys.modules
        pytest.importorskip("fsspec")
        try:
            __import__(package)
            pytest.skip(f"{package} is installed")
        except ImportError:
            pass
    with pytest.raises(ValueError, match=rf"data\.train=.*{says}"):
        check_address("data.train", text, False)


def test_passwords_of_netrc_go_to_their_host_over_https_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "netrc").write_text("machine h.org login me password word\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert authorization("https://h.org/x") == {"Authorization": "Basic " + b64encode(b"me:word").decode()}
    assert authorization("http://h.org/x") == authorization("https://other.org/x") == {}
