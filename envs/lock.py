"""Pin what the current environment has: writes the lock files and the conda environment beside this file.

    python -m venv fresh
    fresh/bin/pip install -r envs/requirements.in -r envs/stain.in -r envs/dev.in   # with --upgrade to move on
    fresh/bin/python envs/lock.py

Each lock holds the packages of its ``.in`` file and everything they need, by exact version, to be installed with
``pip install --no-deps``. Snakemake copies ``pipeline.yaml`` before it builds the environment, so that file repeats the
pins; what may only be installed without its requirements is left to ``pipeline.post-deploy.sh``.
"""

from __future__ import annotations

import sys
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent

# staintools asks for opencv-python, whose modules opencv-python-headless provides without needing a display.
REPLACED = {"opencv-python": "opencv-python-headless", "spams": "spams-bin"}

# Only PyTorch's Linux build for x86 takes these.
CUDA = ("nvidia-", "cuda-", "triton")
CUDA_MARKER = '; platform_system == "Linux" and platform_machine == "x86_64"'

# Its requirements name packages that are replaced above.
APART = ("staintools",)


def pinned(name: str, version: str) -> str:
    """A line of a lock file."""
    return f"{name}=={version}{CUDA_MARKER if name.startswith(CUDA) else ''}"


def needed(roots: list[str]) -> dict[str, str]:
    """Name and version of `roots` and of everything they need, with the markers of this environment."""
    pins: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    queue = [Requirement(root) for root in roots]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        name = REPLACED.get(name, name)
        for extra in ("", *sorted(requirement.extras)):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            found = distribution(name)
            pins[name] = found.version.split("+")[0]
            for line in found.requires or []:
                other = Requirement(line)
                if other.marker is None or other.marker.evaluate({"extra": extra}):
                    queue.append(other)
    return pins


def names(path: Path) -> list[str]:
    """Requirements of an ``.in`` file."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def write_conda(pins: dict[str, str]) -> None:
    """Write the conda environment of the rules and the script that Snakemake runs once it is built."""
    apart = {name: version for name, version in pins.items() if name in APART}
    lines = [
        "# Environment of the rules for `snakemake --sdm conda`; without it they run in the one that runs Snakemake.",
        "# Written by envs/lock.py.",
        "channels:",
        "  - conda-forge",
        "  - nodefaults",
        "dependencies:",
        "  - python=3.12",
        "  - pip",
        "  - pip:",
    ]
    lines += [
        f"      - '{pin}'" for pin in (pinned(*item) for item in sorted(pins.items())) if not pin.startswith(APART)
    ]
    (HERE / "pipeline.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    script = [
        "#!/usr/bin/env bash",
        "# Run by Snakemake in the new environment. Written by envs/lock.py.",
        "set -euo pipefail",
        f"python -m pip install --quiet --no-deps {' '.join(pinned(*item) for item in sorted(apart.items()))}",
    ]
    (HERE / "pipeline.post-deploy.sh").write_text("\n".join(script) + "\n", encoding="utf-8")


def write(path: Path, pins: dict[str, str], comment: str) -> None:
    """Write a lock file."""
    lines = [f"# {comment}", "# Written by envs/lock.py; install with: pip install --no-deps -r FILE"]
    lines += [pinned(*item) for item in sorted(pins.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    """Write both locks."""
    runtime = needed(names(HERE / "requirements.in") + names(HERE / "stain.in"))
    write(HERE / "requirements.lock", runtime, "The pipeline's packages, pinned.")
    dev = {name: version for name, version in needed(names(HERE / "dev.in")).items() if name not in runtime}
    write(HERE / "dev.lock", dev, "Tools for tests and style, pinned, on top of requirements.lock.")
    write_conda(runtime)
    return 0


if __name__ == "__main__":
    sys.exit(main())
