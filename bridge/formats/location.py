"""Where a checkpoint lies: a local path, or a bucket (``gs://``, ``s3://``), by one interface.

Local directories are read with the system's calls; everything else goes through TensorStore's
key-value stores, which list and read a bucket without further packages.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bridge.errors import Problem, SourceRefused

_BUCKETS = {"gs": "gcs", "s3": "s3"}


@cache
def tensorstore_context() -> Any:
    """One context for all reads: no cache (each byte is used once), concurrency for few cores."""
    import tensorstore as ts

    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": 0},
            "data_copy_concurrency": {"limit": 2},
            "file_io_concurrency": {"limit": 4},
        }
    )


@dataclass(frozen=True)
class Location:
    """A file or directory: an absolute local path, or ``scheme://…`` without a trailing slash."""

    url: str

    @classmethod
    def parse(cls, path: str | Path | Location) -> Location:
        """From what a user typed. ``~`` is expanded, relative paths are made absolute."""
        if isinstance(path, Location):
            return path
        text = str(path)
        if "://" in text:
            scheme, rest = text.split("://", 1)
            if scheme == "file":
                return cls(str(Path(rest).absolute()))
            if scheme not in (*_BUCKETS, "memory"):
                known = ", ".join(f"{name}://" for name in _BUCKETS)
                raise SourceRefused(
                    Problem(f"{text}: {scheme}:// cannot be read", f"use a local path or one of {known}")
                )
            return cls(text.rstrip("/"))
        # absolute, not resolved: a symlinked step is named as the user named it
        return cls(str(Path(text).expanduser().absolute()))

    @property
    def local(self) -> Path | None:
        """The path, where the system's own calls can read it."""
        return None if "://" in self.url else Path(self.url)

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    @property
    def parent(self) -> Location:
        return Location(self.url.rsplit("/", 1)[0] or "/")

    def __truediv__(self, name: str) -> Location:
        return Location(f"{self.url.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.url

    def names(self) -> list[str]:
        """Names of the files and directories directly inside, sorted; empty for a file."""
        if self.local is not None:
            return sorted(entry.name for entry in self.local.iterdir()) if self.local.is_dir() else []
        return sorted({key.split("/", 1)[0] for key in self.files()})

    def files(self) -> list[str]:
        """Paths of all files inside, at any depth, relative and sorted."""
        if self.local is not None:
            return sorted(
                str(path.relative_to(self.local)) for path in self.local.rglob("*") if path.is_file()
            )
        return sorted(key.decode() for key in self.keys() if key)

    def is_file(self) -> bool:
        if self.local is not None:
            return self.local.is_file()
        return self.read_bytes() is not None

    def exists(self) -> bool:
        if self.local is not None:
            return self.local.exists()
        return bool(self.names()) or self.is_file()

    def read_bytes(self) -> bytes | None:
        """The file's contents, or None when there is no such file.

        Raises:
            SourceRefused: it is there and cannot be read.
        """
        try:
            if self.local is not None:
                return self.local.read_bytes() if self.local.is_file() else None
            result = _store(self.parent.kvstore()).read(self.name).result()
        except (OSError, ValueError) as error:
            raise SourceRefused(Problem(f"{self}: {error}", "check the path and its permissions")) from error
        return bytes(result.value) if result.state == "value" else None

    def keys(self) -> list[bytes]:
        """All keys below, as TensorStore lists them."""
        try:
            return list(_store(self.kvstore()).list().result())
        except (OSError, ValueError) as error:
            raise SourceRefused(Problem(f"{self}: {error}", "check the path and its permissions")) from error

    def kvstore(self) -> dict[str, Any]:
        """TensorStore's specification of this directory."""
        if self.local is not None:
            return {"driver": "file", "path": f"{self.url.rstrip('/')}/"}
        scheme, rest = self.url.split("://", 1)
        if scheme == "memory":
            return {"driver": "memory", "path": f"{rest}/"}
        bucket, _, path = rest.partition("/")
        return {"driver": _BUCKETS[scheme], "bucket": bucket, "path": f"{path}/" if path else ""}


def _store(spec: dict[str, Any]) -> Any:
    import tensorstore as ts

    return ts.KvStore.open(spec, context=tensorstore_context()).result()
