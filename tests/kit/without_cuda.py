"""Stand-ins for the CUDA libraries that PyPI's torch links: gigabytes that no test on a CPU calls.

Run by the interpreter of an environment that has torch installed without them. Every function answers 100,
cudaErrorNoDevice, so torch sees a machine without a GPU. A build of torch for CPUs links none of them, and
is left as it is.
"""

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

NO_DEVICE = 100
FUNCTION = re.compile(r"(?:__cuda|cu|nccl|nv)[A-Za-z_0-9]+")


def printed(*command: object) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


def symbols(library: Path) -> Iterator[tuple[str, str, bool]]:
    """Names in the dynamic table, the version of each, and whether it is defined here."""
    for line in printed("nm", "-D", library).splitlines():
        *_, kind, symbol = line.split()
        name, _, version = symbol.partition("@")
        yield name, version.lstrip("@"), kind not in "Uwv"


def build(library: Path, version: str, functions: list[str]) -> None:
    script = library.with_name("versions")
    script.write_text(f"{version} {{ global: *; }};\n")
    source = "".join(f"int {name}(void) {{ return {NO_DEVICE}; }}\n" for name in functions)
    options = [
        "-shared",
        "-fPIC",
        "-w",
        f"-Wl,-soname,{library.name},--version-script={script}",
        "-x",
        "c",
        "-",
    ]
    subprocess.run(["cc", *options, "-o", str(library)], check=True, input=source, text=True)
    script.unlink()


def main() -> None:
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    site = Path(found.origin).parents[1]
    lib = site / "torch" / "lib"
    linked = [*lib.glob("*.so"), *(site / "torchvision").glob("*.so")]
    needed = {
        name for each in linked for name in re.findall(r"NEEDED.*\[(.+)\]", printed("readelf", "-d", each))
    }
    present = {path.name for folder in (lib, site / "torchvision.libs") for path in folder.glob("*.so*")}
    absent = sorted(name for name in needed - present if re.match(r"lib(cu|nv|nccl)", name))
    table = {symbol for each in linked for symbol in symbols(each)}
    defined = {name for name, _, here in table if here}
    wanted = {
        name: version
        for name, version, _ in sorted(table)
        if name not in defined and FUNCTION.fullmatch(name)
    }
    for name in absent:
        # a library is its version's name, but for NVSHMEM; what has no version may be in any of them
        mine = {version for version in wanted.values() if version and version.lower() in name.lower()}
        (version,) = mine or {name}
        unversioned = "" if name == absent[0] else None
        build(lib / name, version, [each for each, of in wanted.items() if of in (version, unversioned)])
    print(f"{len(absent)} CUDA libraries left out, {len(wanted)} functions answer that there is no GPU")


if __name__ == "__main__":
    main()
