"""What `make test-newest` says of versions and of broken tests."""

from importlib.metadata import version

from tools.newest import result_table, version_table

REPORT = """<testsuites><testsuite>
<testcase classname="tests.kernels.test_a" name="test_ok"/>
<testcase classname="tests.kernels.test_a" name="test_sum[a|b]">
<failure message="assert 3 == 4&#10;  + where 3">long</failure></testcase>
<testcase classname="tests.kernels.test_b" name="test_import"><error>ImportError: gone</error>
</testcase>
<testcase classname="tests.kernels.test_b" name="test_later"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>"""


def test_versions_that_differ_are_listed_with_the_ones_that_matter() -> None:
    rich = version("rich")
    lock = f"# a note\nrich=={rich}\npydantic==0.0.1\nno-such-package==3\ntorch==0.1\n"
    assert version_table(lock).splitlines()[3:] == [
        f"| pydantic | 0.0.1 | {version('pydantic')} |",
        "| no-such-package | 3 | - |",
        f"| torch | 0.1 | {version('torch')} |",
    ]


def test_every_broken_test_has_a_line() -> None:
    head, *table = result_table(REPORT).splitlines()
    assert head == "1 passed, 2 broken, 1 skipped"
    assert table[3:] == [
        "| tests.kernels.test_a.test_sum[a\\|b] | assert 3 == 4 |",
        "| tests.kernels.test_b.test_import | ImportError: gone |",
    ]
    assert result_table("<testsuites/>") == "0 passed, 0 broken, 0 skipped"
