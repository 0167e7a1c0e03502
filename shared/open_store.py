"""The reader of a weight store, by its URL."""

from shared.fsspec_store import FsspecStore
from shared.http_store import HttpStore
from shared.store import WeightReader
from shared.store_url import is_http


def open_store(url: str, run: str, *, token: str | None = None) -> WeightReader:
    """The reader of a run's versions: over HTTP(S), or by fsspec.

    Args:
        url: of the store.
        run: name of the run.
        token: bearer token, for HTTP alone.

    Raises:
        ConfigError: the URL or the run cannot be used.
    """
    return HttpStore(url, run, token=token) if is_http(url) else FsspecStore(url, run)
