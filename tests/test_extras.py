"""A package that is missing is asked for by the extra that brings it."""

import pytest

from jaxpack._extras import import_extra


def test_a_missing_package_is_named_with_its_extra():
    with pytest.raises(ModuleNotFoundError, match=r"plots need not_there, which .*: pip install 'jaxpack\[plot\]'"):
        import_extra("not_there.figure", "plot", "plots")
    with pytest.raises(ModuleNotFoundError, match="plots need not-there, which is not installed"):
        import_extra("not_there", "plot", "plots", "not-there")


def test_a_missing_import_inside_a_package_is_not_a_missing_extra(monkeypatch, tmp_path):
    (tmp_path / "half_there.py").write_text("import not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'not_there'"):
        import_extra("half_there", "plot", "plots")


def test_a_package_that_is_there_is_returned():
    assert import_extra("numpy.linalg", "plot", "plots").norm([3, 4]) == 5
