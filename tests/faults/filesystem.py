"""Faults of the file system, of processes and of the machine around a conversion."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import shlex
import shutil
import signal
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bridge.publish.atomic import lock_file
from bridge.publish.lock import locked
from tests.faults.table import Expect, Fault, Ran, Scene, run_here
from tests.kit import checkpoints
from tests.kit.digest import snapshot

Provoke = Callable[[Scene], object]

# Ways to provoke.


@functools.cache
def can(*command: str) -> bool:
    return (
        shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True).returncode == 0
    )


def need(*command: str) -> None:
    if not can(*command):
        pytest.skip(f"{shlex.join(command)} does not run here")


def strace(scene: Scene, call: str, what: str, *only: Path) -> None:
    """A system call fails; with ``only``, on these files."""
    need("strace", "-o", os.devnull, "true")
    paths = [part for path in only for part in ("-P", str(path))]
    scene.prefix = [
        "strace", "-f", "-qq", "-o", os.devnull, *paths, "-e", f"trace={call}", "-e", f"inject={call}:{what}",
    ]  # fmt: skip


def fails(call: str, what: str) -> Provoke:
    return lambda scene: strace(scene, call, what)


def mounted(scene: Scene, mount: str, where: Path) -> None:
    """Run below a mount of this process alone; what is left in it is listed beside it afterwards."""
    need("unshare", "-rm", "true")
    listing = scene.tmp.with_name(scene.tmp.name + ".left")
    script = (
        f'{mount} && "$@"; code=$?; ls -A {shlex.quote(str(where))} > {shlex.quote(str(listing))}; exit $code'
    )
    scene.prefix = ["unshare", "-rm", "sh", "-c", script, "sh"]


def nothing_left(scene: Scene, ran: Ran) -> None:
    assert scene.tmp.with_name(scene.tmp.name + ".left").read_text() == ""


def tmpfs(options: str) -> Provoke:
    """The output's directory is a small file system in memory."""

    def provoke(scene: Scene) -> None:
        scene.new()
        where = scene.dst.parent
        mounted(scene, f"mount -t tmpfs -o {options} tmpfs {shlex.quote(str(where))}", where)

    return provoke


def large(scene: Scene) -> None:
    """A model of 12 MB."""
    scene.save(checkpoints.pi0_tree(lora={}, vocab=230_003))
    scene.options += ["--dtype", "keep"]


def both(*steps: Provoke) -> Provoke:
    def provoke(scene: Scene) -> None:
        for step in steps:
            step(scene)

    return provoke


def fills_up(scene: Scene) -> None:
    """A disk that had space enough when the conversion was planned."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    large(scene)
    scene.new()
    scene.patch.setattr("bridge.conversion.plan.check_space", lambda destination, needed: [])
    where = scene.dst.parent

    @contextlib.contextmanager
    def mount() -> Iterator[None]:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=755", "tmpfs", where], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", where], check=True)

    scene.during = mount


def unprivileged(scene: Scene) -> None:
    """Permissions hold for root as well, once it has no capabilities."""
    if os.geteuid() == 0:
        need("setpriv", "--bounding-set=-all", "--inh-caps=-all", "true")
        scene.prefix = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    else:
        scene.process = True


def mode(scene: Scene, path: Path, bits: int) -> None:
    """A mode that denies something, taken back after the command."""
    unprivileged(scene)
    before = stat.S_IMODE(path.stat().st_mode)
    inner = scene.run

    def run() -> Ran:
        path.chmod(bits)
        try:
            return inner()
        finally:
            path.chmod(before)

    scene.run = run  # type: ignore[method-assign]


def while_running(act: Callable[[Scene], object], *, before: bool = False) -> Provoke:
    """Something happens after the first output's steps, or before them."""

    def provoke(scene: Scene) -> None:
        from bridge.conversion import run as runner

        inner = runner.run_steps

        def run_steps(*arguments: Any, **keywords: Any) -> Any:
            if before:
                act(scene)
            done = inner(*arguments, **keywords)
            if not before:
                act(scene)
            return done

        scene.patch.setattr(runner, "run_steps", run_steps)

    return provoke


def limit(which: int, value: int) -> Provoke:
    def provoke(scene: Scene) -> None:
        scene.limits = f"resource.setrlimit({which}, ({value}, {value}))"

    return provoke


def at(make: Callable[[Path], object], *, overwrite: bool) -> Provoke:
    """Something else lies where the output should be."""

    def provoke(scene: Scene) -> None:
        scene.new()
        make(scene.dst)
        if overwrite:
            scene.options.append("--overwrite")

    return provoke


def to(*parts: str, overwrite: bool = False) -> Provoke:
    def provoke(scene: Scene) -> None:
        scene.new()
        scene.dst = scene.tmp.joinpath(*parts)
        if overwrite:
            scene.options.append("--overwrite")

    return provoke


def named(name: str) -> Provoke:
    return to("made", name)


def bind_socket(path: Path) -> None:
    # its path may not be longer than 107 bytes
    here = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{here}/{path.name}")
    os.close(here)


def device(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may make a device")
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))


# 13: saves that were not finished.


def unfinished_alone(scene: Scene) -> None:
    scene.step = scene.src = scene.step.rename(scene.step.with_name("7.orbax-checkpoint-tmp-3"))


def unfinished_beside(scene: Scene) -> None:
    shutil.copytree(scene.step, scene.step.with_name("8.orbax-checkpoint-tmp-3"))
    scene.src = scene.tmp / "run"


def unfinished_only(scene: Scene) -> None:
    unfinished_alone(scene)
    scene.src = scene.tmp / "run"


def not_merged(scene: Scene) -> None:
    (scene.params / "manifest.ocdbt").unlink()
    shutil.rmtree(scene.params / "d")


# 16: sources that change.


def rewrite(scene: Scene) -> None:
    file = scene.data_file()
    file.write_bytes(file.read_bytes())


def exchange_file(scene: Scene) -> None:
    file = scene.data_file()
    state = file.stat()
    shutil.copy(file, file.with_name("copy"))
    file.with_name("copy").rename(file)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def pruned(scene: Scene) -> None:
    """The step is deleted, as max_to_keep does; it is put back before the source is looked at."""
    aside = scene.tmp.with_name(scene.tmp.name + ".aside")
    while_running(lambda scene: scene.step.rename(aside), before=True)(scene)
    inner = scene.run

    def run() -> Ran:
        try:
            return inner()
        finally:
            aside.rename(scene.step)

    scene.run = run  # type: ignore[method-assign]


def torch_rewritten(scene: Scene) -> None:
    file = scene.from_torch()
    while_running(lambda scene: file.write_bytes(file.read_bytes()))(scene)


def stats_rewritten(scene: Scene) -> None:
    file = scene.step / "assets" / "my_robot" / "norm_stats.json"
    while_running(lambda scene: file.write_bytes(file.read_bytes()))(scene)


# 33, 34: disks.


def read_fails(scene: Scene) -> None:
    strace(scene, "read,pread64,preadv,preadv2", "error=EIO:when=1", scene.data_file())


def torch_read_fails(scene: Scene) -> None:
    strace(scene, "pread64,preadv,preadv2", "error=EIO:when=1", scene.from_torch())


# 39: one and the same.


def bind_mount(scene: Scene) -> None:
    scene.new()
    other = scene.tmp / "other"
    other.mkdir()
    scene.dst = other / "out"
    mounted(scene, shlex.join(["mount", "--bind", str(scene.step), str(other)]), other)


def bind_mount_of_a_parent(scene: Scene) -> None:
    """The source, seen through a mount of what holds the old output."""
    shutil.copytree(scene.step, scene.dst / "step")
    other = scene.tmp / "other"
    other.mkdir()
    scene.src = other / "step"
    mounted(scene, shlex.join(["mount", "--bind", str(scene.dst), str(other)]), other)


def hard_links(scene: Scene) -> None:
    """The old output holds the source's own files: removing it takes away no more than names."""
    file = scene.from_torch()
    scene.dst = scene.tmp / "made" / "out"
    (scene.dst / "model.safetensors").unlink()
    os.link(file, scene.dst / "model.safetensors")
    scene.options = ["--to", "orbax", "--overwrite"]


def file_in_the_output(scene: Scene) -> None:
    """The source is a symlink into the output to be replaced."""
    file = scene.from_torch()
    scene.dst = scene.tmp / "made" / "out"
    file.unlink()
    file.symlink_to(scene.dst / "model.safetensors")
    scene.src = file
    scene.options = ["--to", "orbax", "--overwrite"]


# 40: symlinks.


def loop_above(scene: Scene) -> None:
    scene.new()
    (scene.tmp / "made" / "loop").symlink_to("loop")
    scene.dst = scene.tmp / "made" / "loop" / "out"


def source_loop(scene: Scene) -> None:
    scene.src = scene.tmp / "run" / "loop"
    scene.src.symlink_to("loop")


def file_loop(scene: Scene) -> None:
    file = scene.from_torch()
    file.unlink()
    file.symlink_to(file.name)


def linked(name: str) -> Provoke:
    """A file beside the weights, or the weights, from elsewhere: the content of that would be published."""

    def provoke(scene: Scene) -> None:
        scene.from_torch()
        file = scene.step / name
        file.parent.mkdir(parents=True, exist_ok=True)
        content = file.read_bytes() if file.exists() else b"-----BEGIN OPENSSH PRIVATE KEY-----"
        file.unlink(missing_ok=True)
        (scene.tmp / "id_rsa").write_bytes(content)
        file.symlink_to(scene.tmp / "id_rsa")

    return provoke


def linked_directory(scene: Scene) -> None:
    scene.from_torch()
    file = scene.step / "assets"
    file.symlink_to(file.rename(scene.tmp / "shared"))


def linked_within(scene: Scene) -> None:
    """Links within the source, and a source that is reached through one."""
    file = scene.from_torch()
    (scene.step / "weights").mkdir()
    file.symlink_to(os.path.relpath(file.rename(scene.step / "weights" / "epoch7"), file.parent))
    scene.src = scene.step.with_name("last")
    scene.src.symlink_to(scene.step.name)


def linked_step(scene: Scene) -> None:
    """Steps on another disk, linked to from the run's directory."""
    scene.step.rename(scene.tmp / "scratch")
    scene.step.symlink_to(scene.tmp / "scratch")
    scene.src = scene.tmp / "run"


def linked_file(scene: Scene) -> None:
    """The file that is named may be a link; what lies beside the link may not."""
    file = scene.from_torch()
    scene.src = scene.tmp / "mine" / "pi0.safetensors"
    scene.src.parent.mkdir()
    scene.src.symlink_to(file)
    shutil.copy(scene.step / "config.json", scene.src.parent)


def beside_a_linked_file(scene: Scene) -> None:
    linked_file(scene)
    (scene.tmp / "mine" / "config.json").unlink()
    (scene.tmp / "mine" / "config.json").symlink_to(scene.step / "config.json")


def another_cache(scene: Scene) -> None:
    """A snapshot with a link into the blobs of another repository."""
    file = scene.from_torch()
    snapshot = scene.tmp / "models--a" / "snapshots" / "0123"
    blobs = scene.tmp / "models--b" / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(scene.step, snapshot)
    (snapshot / file.name).unlink()
    (snapshot / file.name).symlink_to(file.rename(blobs / "0123abcd"))
    scene.src = snapshot


# 41, 42, 43.


def read_only_mount(scene: Scene) -> None:
    scene.new()
    where = shlex.quote(str(scene.dst.parent))
    mounted(scene, f"mount --bind {where} {where} && mount -o remount,bind,ro {where}", scene.dst.parent)


def lock_held(scene: Scene) -> None:
    inner = scene.run
    scene.process = True

    def run() -> Ran:
        with locked(lock_file(scene.dst), scene.dst):
            return inner()

    scene.run = run  # type: ignore[method-assign]


def own_number(scene: Scene, ran: Ran) -> None:
    assert f"another bridge process (pid {os.getpid()}) is writing {scene.dst}" in ran.err


def appears(scene: Scene) -> None:
    """Another program, which knows no lock, makes the same directory; it is not ours to touch."""
    scene.new()

    def act(scene: Scene) -> None:
        (scene.dst / "theirs").mkdir(parents=True)

    inner = scene.run

    def run() -> Ran:
        ran = inner()
        (scene.dst / "theirs").rmdir()
        scene.dst.rmdir()
        return ran

    while_running(act)(scene)
    scene.run = run  # type: ignore[method-assign]


def other_device(scene: Scene) -> None:
    if os.stat("/dev/shm").st_dev == scene.tmp.stat().st_dev:
        pytest.skip("there is no second device")
    scene.environment["TMPDIR"] = "/dev/shm"


def mount_point(scene: Scene) -> None:
    """An empty directory that cannot be exchanged, something being mounted there."""
    scene.new()
    scene.dst.mkdir()
    scene.options.append("--overwrite")
    mounted(scene, f"mount -t tmpfs tmpfs {shlex.quote(str(scene.dst))}", scene.dst)


def overlay(scene: Scene) -> None:
    """The old output lies in a lower layer, as in the image of a container: the system moves no such directory."""
    lower = shlex.quote(str(scene.dst.parent))
    layers = f"mount -t tmpfs tmpfs /mnt && mkdir /mnt/upper /mnt/work && mount -t overlay overlay {lower} -o"
    mounted(scene, f"{layers} lowerdir={lower},upperdir=/mnt/upper,workdir=/mnt/work", scene.dst.parent)


def only_the_old_one(scene: Scene, ran: Ran) -> None:
    assert scene.tmp.with_name(scene.tmp.name + ".left").read_text() == "out\n"


# 47 to 50.


def short_writes(scene: Scene) -> None:
    real = os.pwrite
    scene.patch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[: len(data) // 2 + 1], at))


def set_gid(scene: Scene) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root has a second group for sure")
    os.chown(scene.dst.parent, -1, 12)
    scene.dst.parent.chmod(0o2775)


def has_group(scene: Scene, ran: Ran) -> None:
    for path in (scene.dst, *scene.dst.rglob("*")):
        assert path.stat().st_gid == 12, path
        assert path.is_file() or path.stat().st_mode & stat.S_ISGID, path


def default_acl(scene: Scene) -> None:
    """Group 12 may read whatever is made here (posix_acl_xattr.h: version 2, entries of tag, perm, id)."""
    none = 0xFFFFFFFF
    entries = ((0x01, 7, none), (0x04, 5, none), (0x08, 5, 12), (0x10, 5, none), (0x20, 0, none))
    packed = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little") + bits.to_bytes(2, "little") + number.to_bytes(4, "little")
        for tag, bits, number in entries
    )
    try:
        os.setxattr(scene.dst.parent, "system.posix_acl_default", packed)
    except OSError:
        pytest.skip("the file system has no ACLs")


def has_acl(scene: Scene, ran: Ran) -> None:
    for path in (scene.dst, *scene.dst.rglob("*")):
        assert "system.posix_acl_access" in os.listxattr(path), path


def modes(directory: int, file: int) -> Callable[[Scene, Ran], None]:
    def also(scene: Scene, ran: Ran) -> None:
        for path in (scene.dst, *scene.dst.rglob("*")):
            assert stat.S_IMODE(path.stat().st_mode) == (directory if path.is_dir() else file), path

    return also


def another_time(scene: Scene) -> None:
    scene.environment |= {
        "SOURCE_DATE_EPOCH": "1",
        "TZ": "Pacific/Kiritimati",
        "LC_ALL": "C",
        "PYTHONHASHSEED": "7",
    }


def same_bytes(scene: Scene, ran: Ran) -> None:
    first = snapshot(scene.dst)
    assert run_here(scene.arguments()).code == 0
    assert snapshot(scene.dst) == first


def slow(scene: Scene) -> None:
    strace(scene, "read", "delay_enter=20000", scene.data_file())


def out_of_memory(scene: Scene) -> None:
    raise MemoryError


def no_thread(scene: Scene) -> None:
    raise RuntimeError("can't start new thread")


EXISTS, OURS = r"error: .*made/out exists$", r"error: .*made/out exists and "

ROWS = [
    Fault(13, "the step alone", unfinished_alone, Expect(r"is an unfinished save")),
    Fault(13, "beside a finished one", unfinished_beside, Expect(r"incomplete: 8\.orbax-checkpoint-tmp-3", 0)),
    Fault(13, "no finished one", unfinished_only, Expect(r"has no complete step")),
    Fault(13, "processes not merged", not_merged, Expect(r"manifest\.ocdbt is missing: the save did not finish")),
    Fault(16, "rewritten", while_running(rewrite), Expect(r"ocdbt\.process_0/d/\w+ changed while it was read")),
    Fault(16, "exchanged", while_running(exchange_file), Expect(r"d/\w+ changed while it was read")),
    Fault(16, "pruned", pruned, Expect(r"was removed while it was read")),
    Fault(16, "PyTorch", torch_rewritten, Expect(r"model\.safetensors changed while it was read")),
    Fault(16, "norm stats", stats_rewritten, Expect(r"norm_stats\.json changed while it was read")),
    Fault(33, "8 MB", both(large, tmpfs("size=8m")),
          Expect(r"made/out needs 1\d\.\d MB, but only 8\.\d+ MB are free", also=nothing_left)),
    Fault(33, "no inode left", tmpfs("nr_inodes=6"), Expect(r"made/.*No space left on device", also=nothing_left)),
    Fault(33, "while it runs", fills_up, Expect(r"made/.*No space left on device")),
    Fault(33, "first byte", fails("pwrite64", "error=ENOSPC:when=2"), Expect(r"made/.*No space left on device")),
    Fault(33, "all bytes", fails("pwrite64", "error=ENOSPC"), Expect(r"made/.*No space left on device")),
    Fault(33, "a quota", fails("pwrite64", "error=EDQUOT:when=9"), Expect(r"Disk quota exceeded\n.*your quota")),
    Fault(33, "at fsync", fails("fsync", "error=ENOSPC:when=1"), Expect(r"made/.*No space left on device")),
    Fault(33, "new directory", fails("mkdir", "error=ENOSPC"), Expect(r"made/.*No space left on device")),
    Fault(34, "reading", read_fails, Expect(r"ocdbt\.process_0/d/\w+.*Input/output error")),
    Fault(34, "reading PyTorch", torch_read_fails, Expect(r"model\.safetensors: .*Input/output error")),
    Fault(34, "writing", fails("pwrite64", "error=EIO:when=5"), Expect(r"made/.*Input/output error\n.*the disk")),
    Fault(34, "the first fsync", fails("fsync", "error=EIO:when=1"), Expect(r"made/.*Input/output error")),
    Fault(34, "a later fsync", fails("fsync", "error=EIO:when=4"), Expect(r"made/.*Input/output error")),
    Fault(34, "the rename", fails("renameat2", "error=EIO"), Expect(r"made/out: Input/output error")),
    Fault(35, "one by one", why_not="kills the process it would be judged by: swept in test_crash.py"),
    *(
        Fault(36, number.name, while_running(functools.partial(lambda n, scene: os.kill(os.getpid(), n), number)),
              Expect(f"^{word}: nothing was written$", 128 + number))
        for number, word in (
            (signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated"), (signal.SIGHUP, "hung up"),
        )
    ),
    Fault(37, "unsynced data lost",
          why_not="needs a machine to lose its power: test_crash.py holds the order of writes and syncs"),
    *(
        Fault(38, f"{what}{', to overwrite' if overwrite else ''}", at(make, overwrite=overwrite),
              Expect(OURS + says if overwrite else EXISTS))
        for what, says, make in (
            ("a file", r"is a file$", lambda path: path.write_text("x")),
            ("a full directory", r"was not written by bridge",
             lambda path: (path.mkdir(), (path / "mine").write_text("x"))),
            ("a dangling symlink", r"is a broken symlink to nowhere$",
             lambda path: path.symlink_to("nowhere")),
            ("a symlink to itself", r"is a broken symlink to out$", lambda path: path.symlink_to("out")),
            ("a symlink to a directory", r"is a symlink to \.\.$", lambda path: path.symlink_to("..")),
            ("a pipe", r"is a pipe$", os.mkfifo),
            ("a socket", r"is a socket$", bind_socket),
            ("a device", r"is a device$", device),
        )
        for overwrite in (False, True)
    ),
    Fault(38, "an empty directory", at(Path.mkdir, overwrite=False), Expect(EXISTS)),
    Fault(38, "an empty directory, to overwrite", at(Path.mkdir, overwrite=True), Expect(r"wrote .*made/out", 0)),
    Fault(39, "the source itself", to("run", "7"), Expect(r"run/7 is inside the source")),
    Fault(39, "the source itself, to overwrite", to("run", "7", overwrite=True), Expect(r"is inside the source")),
    Fault(39, "inside", to("run", "7", "params", "out"), Expect(r"is inside the source")),
    Fault(39, "around", to("run", overwrite=True), Expect(r"the source .*run/7 is inside .*run$")),
    Fault(39, "bind mount, inside", bind_mount, Expect(r"other/out is inside the source")),
    Fault(39, "bind mount, around", bind_mount_of_a_parent, Expect(r"the source .*step is inside .*made/out")),
    Fault(39, "hard links", hard_links, Expect(r"wrote .*made/out", 0)),
    Fault(39, "by a symlink", file_in_the_output,
          Expect(r"the source .*run/7/model\.safetensors is inside .*made/out$")),
    Fault(39, "another case of the name",
          why_not="this kernel has no directories without case: the bind mounts above show that it is the inode "
                  "that is compared, not the name"),
    Fault(40, "above the output", loop_above, Expect(r"made/loop is a broken symlink to loop")),
    Fault(40, "the source", source_loop, Expect(r"run/loop.*(does not exist|symbolic links)")),
    Fault(40, "a source file", file_loop, Expect(r"model\.safetensors.*(symbolic links|missing|no safetensors)")),
    *(
        Fault(40, f"{name} from elsewhere", linked(name), Expect(rf"7/{name} is a symlink to \S+/id_rsa, outside"))
        for name in ("model.safetensors", "config.json", "bridge.json", "assets/my_robot/norm_stats.json", "assets/x")
    ),
    Fault(40, "assets from elsewhere", linked_directory, Expect(r"7/assets is a symlink to \S+/shared, outside")),
    Fault(40, "within the source", linked_within, Expect(r"wrote", 0)),
    Fault(40, "a step on another disk", linked_step, Expect(r"using step 7, .*(.|\n)*wrote", 0)),
    Fault(40, "the file that is named", linked_file, Expect(r"wrote", 0)),
    Fault(40, "a file beside the file that is named", beside_a_linked_file,
          Expect(r"mine/config\.json is a symlink to .*7/config\.json, outside")),
    Fault(40, "the cache of another repository", another_cache,
          Expect(r"model\.safetensors is a symlink to .*models--b/blobs/0123abcd, outside")),
    Fault(41, "read-only mount", read_only_mount, Expect(r"made is on a read-only file system")),
    Fault(41, "no permission", lambda s: mode(s, s.dst.parent, 0o555), Expect(r"made is not writable")),
    Fault(41, "no way through", lambda s: mode(s, s.dst.parent, 0o666), Expect(r"made.*(is not writable|denied)")),
    Fault(41, "unreadable source file", lambda s: mode(s, s.data_file(), 0o000),
          Expect(r"ocdbt\.process_0/d/\w+.*[Pp]ermission.denied")),
    Fault(41, "unreadable source", lambda s: mode(s, s.params, 0o000), Expect(r"params.*[Pp]ermission.denied")),
    Fault(42, "the second of two", lock_held, Expect(r"another bridge", also=own_number)),
    Fault(42, "a program without locks", appears, Expect(r"made/out was created while bridge was running")),
    Fault(43, "TMPDIR elsewhere", other_device, Expect(r"wrote .*made/out", 0)),
    Fault(43, "the output a mount", mount_point, Expect(r"made/out: Device or resource busy", also=nothing_left)),
    Fault(43, "the old output in a lower layer", overlay,
          Expect(r"made/out: cannot be replaced: it lies in a lower layer of an overlay.*\n.*another output",
                 also=only_the_old_one)),
    Fault(44, "255 bytes", named("é" * 127 + "x"), Expect(r"wrote", 0)),
    Fault(44, "256 bytes", named("é" * 128), Expect(r"a name of 256 bytes exceeds the 255 that the file")),
    Fault(44, "a long path", to(*["d" * 200] * 20), Expect(r"path has \d+ bytes")),
    Fault(44, "bytes of no encoding", named(os.fsdecode(b"o\xff\xfet")), Expect(r"wrote .*made/o\\udcff\\udcfet,", 0)),
    Fault(44, "a line break", named("a\nb"), Expect(r"wrote .*made/a\\nb,", 0)),
    Fault(44, "a line break, refused", both(named("a\nb"), lambda s: s.dst.mkdir()), Expect(r"made/a\\nb exists$")),
    Fault(44, "an escape, refused", both(named("a\x1b[2Jb"), lambda s: s.dst.mkdir()),
          Expect(r"made/a\\x1b\[2Jb exists$")),
    Fault(44, "spaces", named("  a b "), Expect(r"wrote", 0)),
    Fault(44, "a dash first", named("-rf"), Expect(r"wrote", 0)),
    Fault(44, "a dot last", named("out."), Expect(r"wrote", 0)),
    Fault(44, "reserved elsewhere", named("CON"), Expect(r"wrote", 0)),
    Fault(44, "a twin in Unicode", both(named("caf\u00e9"), lambda s: (s.tmp / "made" / "cafe\u0301").mkdir()),
          Expect(r"wrote", 0)),
    Fault(44, "no name", to("made", ".."), Expect(r"is not a valid path for a directory")),
    Fault(44, "an address", lambda s: setattr(s, "dst", "gs://bucket/out"), Expect(r"written to local disk")),
    Fault(45, "names that differ by case",
          why_not="this kernel has no directories without case: publish/test_preflight.py plans for one that has"),
    Fault(46, "file size", limit(resource.RLIMIT_FSIZE, 65536), Expect(r"made/.*File too large\n.*ulimit -f")),
    Fault(46, "file size, the record", limit(resource.RLIMIT_FSIZE, 4096), Expect(r"made/.*File too large")),
    Fault(46, "32 descriptors", limit(resource.RLIMIT_NOFILE, 32), Expect(r"wrote", 0)),
    Fault(46, "5 descriptors", limit(resource.RLIMIT_NOFILE, 5), Expect(r"Too many open files")),
    Fault(46, "memory", limit(resource.RLIMIT_AS, 200 << 20), Expect(r"out of memory: .*\n.*ulimit -v")),
    Fault(46, "memory, while it runs", while_running(out_of_memory, before=True), Expect(r"out of memory: no more")),
    Fault(46, "threads", while_running(no_thread, before=True), Expect(r"out of memory: can't start new thread")),
    Fault(47, "short writes", short_writes, Expect(r"wrote", 0)),
    Fault(47, "interrupted", fails("pwrite64", "error=EINTR:when=3"), Expect(r"wrote", 0)),
    Fault(47, "more than 2 GiB at once",
          why_not="needs a tensor of 2 GiB: publish/test_atomic.py holds that a tensor goes out in bounded calls"),
    Fault(48, "umask 077", lambda s: setattr(s, "limits", "os.umask(0o077)"),
          Expect(r"wrote", 0, modes(0o700, 0o600))),
    Fault(48, "umask 002", lambda s: setattr(s, "limits", "os.umask(0o002)"),
          Expect(r"wrote", 0, modes(0o775, 0o664))),
    Fault(48, "setgid", set_gid, Expect(r"wrote", 0, has_group)),
    Fault(48, "default ACL", default_acl, Expect(r"wrote", 0, has_acl)),
    Fault(49, "another time and place", another_time, Expect(r"wrote", 0, same_bytes)),
    Fault(50, "slow reads", slow, Expect(r"wrote", 0)),
]  # fmt: skip
