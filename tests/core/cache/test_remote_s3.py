"""Pushing to an S3 and pulling from it: moto's server, on this machine."""

from __future__ import annotations

from contextlib import suppress

import pytest

from vllmc.core.cache.remote import Remote
from vllmc.core.cache.store import Store
from vllmc.core.cache.transfer import downloaded, pull, push
from vllmc.core.cache.trust import Trust
from vllmc.core.errors import VllmcError
from vllmc.core.events import SilentObserver

SILENT = SilentObserver()

pytestmark = [
    pytest.mark.thorough,
    # botocore and moto, not vllmc.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)

    import s3fs

    # Servers of one process share what they hold.
    with suppress(FileExistsError):
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("s3://shared")
    yield "s3://shared/cache"
    server.stop()


def test_programs_go_through_an_s3_and_back(bucket, store, warm, tmp_path):
    remote = Remote(url=bucket)
    large = b"machine code" * 1_000_000
    warmed = warm(b"one", large)
    target = Store(tmp_path / "target", trust=Trust(unsigned=True))
    assert pull(remote, target, [], SILENT).files == 0
    assert push(remote, store, [warmed.program], SILENT).files == 5
    assert push(remote, store, [warmed.program], SILENT).files == 0
    digest = warmed.units[1].artifact
    part = target.layout.temporary / f"{digest}.part"
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(large[:5_000_000])
    done = pull(remote, target, [warmed.program.key[:8]], SILENT)
    assert (done.files, done.refused) == (5, ())
    assert target.programs(warmed.program.key) == (warmed.program,)
    assert target.verify() == ()
    assert pull(remote, target, [], SILENT).skipped == 5
    blob = f"{bucket}/v1/blobs/{digest[:2]}/{digest}"
    with downloaded(Remote(url=blob), target, SILENT) as path:
        assert path.read_bytes() == large
    with (
        pytest.raises(VllmcError) as caught,
        downloaded(Remote(url=f"{bucket}/none"), target, SILENT),
    ):
        pass
    assert caught.value.code == "no-bundle"


def test_a_bucket_that_is_not_there_has_failed(bucket, store, warm):
    warmed = warm(b"one")
    with pytest.raises(VllmcError) as caught:
        push(Remote(url="s3://nowhere/x"), store, [warmed.program], SILENT)
    assert caught.value.code == "remote-failed"
