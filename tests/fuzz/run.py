"""Coverage-guided fuzzing of one reader: ``python tests/fuzz/run.py zarray --seconds 60``.

Needs atheris (the extra ``fuzz``). What ends badly is written below ``--out``: add it to
``tests/fuzz/found/<target>/``, where a test replays it, and mend the reader.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: address space beyond what the interpreter has taken when fuzzing begins
MEMORY = 1 << 30


def main() -> None:
    sys.path.insert(0, str(ROOT))
    import atheris

    with atheris.instrument_imports(include=["bridge"]):
        from tests.fuzz.targets import TARGETS, refused

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "fuzz")
    options = parser.parse_args()
    target = TARGETS[options.target]

    corpus, out = options.out / "corpus" / options.target, options.out / "crashes" / options.target
    for directory in (corpus, out):
        directory.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    words = corpus.parent / f"{options.target}.dict"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))
    # before the limit: what is imported on the way takes address space too
    with tempfile.TemporaryDirectory(prefix="bridge-fuzz-") as first:
        for seed in target.seeds():
            refused(target, seed, Path(first))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))

    scratch = tempfile.TemporaryDirectory(prefix="bridge-fuzz-")

    def one(data: bytes) -> Any:
        refused(target, data, Path(scratch.name))

    arguments = [
        sys.argv[0],
        f"-max_total_time={options.seconds}",
        "-max_len=4096",
        "-timeout=20",
        "-rss_limit_mb=0",
        "-verbosity=0",
        "-print_final_stats=1",
        f"-artifact_prefix={out}/",
        f"-dict={words}",
        str(corpus),
    ]
    atheris.Setup([each for each in arguments if target.words or not each.startswith("-dict")], one)
    try:
        atheris.Fuzz()
    finally:
        scratch.cleanup()


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


if __name__ == "__main__":
    main()
