"""docs/methods.md is what `python -m docs.list_methods` writes: no method, setting or count of it is out of date."""

from docs.list_methods import OUT, page


def test_the_page_is_that_of_the_methods_as_they_are():
    assert page() == OUT.read_text()
