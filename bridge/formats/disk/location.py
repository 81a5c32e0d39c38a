"""The location of a checkpoint: a local path or a bucket (``gs://``, ``s3://``), with one interface.

Local directories are read with system calls; everything else goes through TensorStore's key-value
stores, which list and read buckets without further packages.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from bridge.errors import Problem, SourceRefused
from bridge.formats.disk import bucket
from bridge.formats.disk.links import link_problem

#: files in one tree; ample for the chunks of a large run
MAX_FILES = 4_000_000

_PATH = "check the path and its permissions"
_BUCKETS = {"gs": "gcs", "s3": "s3"}


@cache
def tensorstore_context() -> Any:
    """The context of all reads: no cache (each byte is read once), concurrency for few cores."""
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
    home: str = field(default="", compare=False, repr=False)
    """The location that a user named and this one was derived from by names, if any. No file outside it is read
    through a link (:mod:`bridge.formats.disk.links`)."""
    timeout: float = field(default=bucket.TIMEOUT, compare=False, repr=False)
    """Seconds to wait for an answer, where it is in a bucket."""

    @classmethod
    def parse(cls, path: str | Path | Location) -> Location:
        """From a user's path or URL: ``~`` is expanded, relative paths are made absolute."""
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
        # absolute, not resolved: messages name a symlinked step as the user did
        return cls(str(Path(text).expanduser().absolute()))

    @property
    def local(self) -> Path | None:
        """The path on a local file system; None for a bucket."""
        return None if "://" in self.url else Path(self.url)

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    @property
    def parent(self) -> Location:
        return Location(self.url.rsplit("/", 1)[0] or "/", timeout=self.timeout)

    def __truediv__(self, name: str) -> Location:
        return Location(f"{self.url.rstrip('/')}/{name}", self.home or self.url, self.timeout)

    def waiting(self, seconds: float) -> Location:
        """The location, with so long to wait for an answer."""
        return replace(self, timeout=seconds)

    def entered(self) -> Location:
        """The location, as a directory that was chosen in the one named: a source of its own where a link leads out
        of that, as to steps on another disk."""
        leads_out = self.local is not None and self.home and link_problem(self.url, self.home) is not None
        return Location(self.url) if leads_out else self

    def check_link(self) -> None:
        """Check that no link leads from here out of the source. Raises SourceRefused."""
        if self.home and (problem := link_problem(self.url, self.home)) is not None:
            raise SourceRefused(problem)

    def __str__(self) -> str:
        return self.url

    def names(self) -> list[str]:
        """Names of the files and directories directly inside, sorted; empty for a file.

        Raises:
            SourceRefused: the directory cannot be listed.
        """
        if self.local is None:
            return sorted({key.split("/", 1)[0] for key in self.files()})
        try:
            return sorted(entry.name for entry in os.scandir(self.local)) if self.local.is_dir() else []
        except OSError as error:
            raise self._refused(error) from error

    def files(self) -> list[str]:
        """Relative paths of all files inside, at any depth, sorted.

        A symlink to a file counts as a file: caches consist of these.

        Raises:
            SourceRefused: a directory cannot be listed, or contains something that is neither a
                file nor a directory (a pipe, a device, a symlink to a directory, a broken one), or a
                symlink that leads out of the source.
        """
        if self.local is None:
            return sorted(key.decode() for key in self.keys() if key)
        self.check_link()
        paths: list[str] = []
        pending = [""] if self.local.is_dir() else []
        while pending:
            inside = pending.pop()
            try:
                entries = list(os.scandir(self.local / inside))
            except OSError as error:
                raise self._refused(error) from error
            for entry in entries:
                path = f"{inside}{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{path}/")
                elif _is_file(entry):
                    if entry.is_symlink():
                        (self / path).check_link()
                    paths.append(path)
                else:
                    raise SourceRefused(_not_a_file(self / path))
            if len(paths) + len(pending) > MAX_FILES:
                raise SourceRefused(
                    Problem(
                        f"{self} contains more than {MAX_FILES} files", "give the checkpoint's own directory"
                    )
                )
        return sorted(paths)

    def is_file(self) -> bool:
        if self.local is not None:
            return self.local.is_file()
        import tensorstore as ts

        try:
            only = ts.KvStore.KeyRange(self.name, f"{self.name}\0")
            store = self.wait(_store(self.parent.kvstore()))
            return bool(self.wait(store.list(only)))
        except (OSError, ValueError) as error:
            raise self._refused(error) from error

    def exists(self) -> bool:
        if self.local is None:
            return bool(self.names()) or self.is_file()
        try:
            return self.local.exists()
        except OSError as error:
            raise self._refused(error) from error

    def read_bytes(self, at_most: int) -> bytes | None:
        """The file's content, or None if there is no such file.

        Raises:
            SourceRefused: it cannot be read, is not a regular file, is larger than ``at_most``
                bytes, or is reached through a link that leads out of the source.
        """
        if self.local is not None:
            self.check_link()
        try:
            if self.local is not None:
                with open_regular(self.local) as file:
                    read = bytearray()
                    # in pieces: a read of `at_most` bytes would allocate them all
                    while len(read) <= at_most and (piece := file.read(1 << 20)):
                        read += piece
                data = bytes(read)
            else:
                store = self.wait(_store(self.parent.kvstore()))
                if self._reaches(store, at_most):
                    data = bytes(at_most + 1)
                else:
                    result = self.wait(store.read(self.name), at_most)
                    if result.state != "value":
                        return None
                    data = bytes(result.value)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise self._refused(error) from error
        if len(data) > at_most:
            raise SourceRefused(
                Problem(
                    f"{self} exceeds the {at_most >> 20} MB limit for this file",
                    "see what it is: no file of its kind is so large",
                )
            )
        return data

    def keys(self) -> list[bytes]:
        """All keys inside, as TensorStore lists them."""
        try:
            store = self.wait(_store(self.kvstore()))
            keys = list(self.wait(store.list()))
            if not keys:
                # TensorStore takes a listing that is not permitted for an empty one
                self.wait(store.read(bucket.PROBED))
        except (OSError, ValueError) as error:
            raise self._refused(error) from error
        return keys

    def wait(self, future: Any, nbytes: int = 0) -> Any:
        """The result of a TensorStore future of this location.

        Args:
            future: what is waited for.
            nbytes: of the answer at most, if it may be long.

        Raises:
            SourceRefused: the bucket cannot be read, or does not answer in time.
            ValueError: it can be read, and what it contains is wrong.
        """
        if self.local is not None or self.url.startswith("memory://"):
            return future.result()
        return bucket.result(future, self.url, self.kvstore(), self.timeout + nbytes / bucket.PER_SECOND)

    def _reaches(self, store: Any, offset: int) -> bool:
        """Whether the file has a byte at ``offset``; stores have no other way to ask for a size."""
        try:
            only = slice(offset, offset + 1)
            return bool(self.wait(store.read(self.name, byte_range=only)).state == "value")
        except (OSError, ValueError):
            return False

    def _refused(self, error: Exception) -> SourceRefused:
        where = error.filename if isinstance(error, OSError) and error.filename else self
        cause = error.strerror if isinstance(error, OSError) and error.strerror else error
        return SourceRefused(Problem(f"{where}: {cause}", _PATH))

    def kvstore(self) -> dict[str, Any]:
        """TensorStore's specification of this directory."""
        if self.local is not None:
            # TensorStore takes no path with `..` in it, and what it means depends on links
            path = os.path.realpath(self.url) if ".." in self.local.parts else self.url
            return {"driver": "file", "path": f"{path.rstrip('/')}/"}
        scheme, rest = self.url.split("://", 1)
        if scheme == "memory":
            return {"driver": "memory", "path": f"{rest}/"}
        name, _, path = rest.partition("/")
        where = {"bucket": name, "path": f"{path}/" if path else "", **bucket.endpoint(scheme)}
        return {"driver": _BUCKETS[scheme], **where}


def is_safe_path(path: str) -> bool:
    """Whether a foreign path is relative and stays below the directory it starts from."""
    return not {"", ".", ".."} & set(path.split("/")) and "\0" not in path


def _store(spec: dict[str, Any]) -> Any:
    import tensorstore as ts

    return ts.KvStore.open(spec, context=tensorstore_context())


def open_regular(path: Path) -> io.FileIO:
    """Open a regular file, or a symlink to one, for unbuffered reading.

    Raises OSError for anything else: a pipe would block, and a device may never end.
    """
    if stat.S_ISDIR(os.stat(path).st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    # it may have been replaced since
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return io.FileIO(fd)


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        # a loop of symlinks
        return False


def _not_a_file(location: Location) -> Problem:
    path = str(location)
    if not os.path.islink(path):
        return Problem(f"{path} is not a regular file", "copy the checkpoint again")
    if os.path.isdir(path):
        return Problem(
            f"{path} is a symlink to a directory", "copy the checkpoint with symlinks resolved (cp -rL)"
        )
    if os.path.lexists(os.path.realpath(path)) and not os.path.islink(os.path.realpath(path)):
        return Problem(
            f"{path} is a symlink to something other than a regular file", "do not trust this checkpoint"
        )
    return Problem(
        f"{path} is a broken symlink", "copy the checkpoint again, with symlinks resolved (cp -rL)"
    )
