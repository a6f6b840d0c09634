"""The groups of the mutation tests name modules and tests that exist."""

from __future__ import annotations

import pytest

from tools.mutants import GROUPS, ROOT, Group


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_a_group_names_modules_and_tests_that_exist(group: Group) -> None:
    modules = {path.stem for path in (ROOT / group.folder).rglob("*.py")}
    left_out = [test.partition("::") for test in group.left_out]

    assert group.modules <= modules
    assert [path for path in group.tests if not (ROOT / path).exists()] == []
    assert [path for path, _, name in left_out if name not in (ROOT / path).read_text(encoding="utf-8")] == []
