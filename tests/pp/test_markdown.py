"""Markdown tables: aligned or line by line, and cells that can't end themselves."""

from paligemma_med.pp import markdown


def test_a_table_is_aligned_words_to_the_left_and_numbers_to_the_right():
    text = markdown.table([["name", "kind", "n"], ["a", "longer", "1,000"], ["bcdef", "", "2"]], left=2)
    assert text.splitlines() == [
        "| name  | kind   |     n |",
        "| ----- | ------ | ----: |",
        "| a     | longer | 1,000 |",
        "| bcdef |        |     2 |",
    ]


def test_narrow_columns_have_a_rule_that_markdown_knows():
    assert markdown.table([["a", "n"], ["b", "5"]]).splitlines()[1] == "| --- | --: |"


def test_line_by_line():
    assert markdown.head(["a", "b", "c"]) == "| a | b | c |\n| --- | ---: | ---: |"
    assert markdown.head(["a", "b"], left=2).endswith("| --- | --- |")
    assert markdown.row(["x", 3, markdown.cell("a|b\nc")]) == "| x | 3 | a\\|b c |"
