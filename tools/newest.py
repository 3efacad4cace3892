"""Run tests with the packages of this environment, and say what broke with which versions.

    python tools/newest.py LOCK [arguments of pytest]

`make test-newest` calls it in an environment that has the newest versions that pyproject.toml
allows. The exit code is pytest's.
"""

import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ALWAYS_SHOWN = ("torch", "transformers", "peft")


def main(arguments: list[str]) -> int:
    """Run, print both tables, return pytest's exit code."""
    lock, *tests = arguments
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *tests]
        code = subprocess.run(command).returncode
        print(version_table(Path(lock).read_text("utf-8")))
        print(f"Python {sys.version.split()[0]}; not listed: as locked\n")
        print(result_table(report.read_text("utf-8")) if report.is_file() else "no test ran")
    return code


def version_table(lock: str) -> str:
    """Return the packages of `lock` whose version here is another one."""
    lines = ["", "| package | locked | here |", "|---|---|---|"]
    for name, locked in re.findall(r"^([\w.-]+)==(\S+)$", lock, re.MULTILINE):
        try:
            here = version(name)
        except PackageNotFoundError:
            here = "-"
        if here.partition("+")[0] != locked or name in ALWAYS_SHOWN:
            lines.append(f"| {name} | {locked} | {here} |")
    return "\n".join(lines)


def result_table(report: str) -> str:
    """Return how many tests passed, and each that did not with the first line of its error."""
    cases = list(ElementTree.fromstring(report).iter("testcase"))
    broken = [(case, bad) for case in cases for bad in case if bad.tag in ("failure", "error")]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - skipped - len({id(case) for case, _ in broken})
    lines = [f"{passed} passed, {len(broken)} broken, {skipped} skipped"]
    if broken:
        lines += ["", "| test | what it said |", "|---|---|"]
    for case, bad in broken:
        said = (bad.get("message") or bad.text or "").strip().splitlines() or ["nothing"]
        test = f"{case.get('classname')}.{case.get('name')}".replace("|", "\\|")
        lines.append(f"| {test} | {said[0][:160]} |".replace("\n", " "))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
