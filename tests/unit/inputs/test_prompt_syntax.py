"""What other programs read in a prompt is said, and plain text is left alone."""

import time
import warnings

import pytest

from ipadapter_jax.inputs.prompt_syntax import PromptSyntaxWarning, find_foreign_syntax, warn_of_foreign_syntax


@pytest.mark.parametrize(
    ("prompt", "piece", "words"),
    [
        ("a (red cat:1.3) on a mat", "(red cat:1.3)", "weight"),
        ("a (cat: .5 )", "(cat: .5 )", "weight"),
        ("a ((cat))", "((cat))", "weight"),
        ("a ((cat) and dog)", "((cat)", "weight"),
        ("(👍:1.2)", "(👍:1.2)", "weight"),
        ("a (cat:2)", "(cat:2)", "weight"),
        ("<LORA:style:1> a cat", "<LORA:style:1>", "merge it into the base model"),
        ("Embedding:bad-hands, cat", "Embedding:bad-hands", "learned token"),
        ("a __animals/dogs__ here", "__animals/dogs__", "placeholder"),
        ("(a cat)1.2", "(a cat)1", "weight"),
        ("cat++, dog", "cat++", "weight"),
        ("a [cat]", "[cat]", "weaker weight"),
        ("a [cat:dog:0.5]", "[cat:dog:0.5]", "change during the steps"),
        ("<lora:style:1> a cat", "<lora:style:1>", "merge it into the base model"),
        ("<lyco:style>", "<lyco:style>", "network"),
        ("embedding:bad-hands, cat", "embedding:bad-hands", "learned token"),
        ("a cat BREAK a dog", "BREAK", "take it out"),
        ("a cat AND a dog", "AND", "write a comma"),
        ("{red|blue} cat", "{red|blue}", "choice of words"),
        ("a __color__ cat", "__color__", "placeholder"),
    ],
)
def test_syntax_is_named_with_its_remedy(prompt, piece, words):
    [found] = find_foreign_syntax(prompt)
    assert found.piece == piece and words in found.meaning
    with pytest.warns(PromptSyntaxWarning, match="^negative_prompt has .* which is read as plain text"):
        warn_of_foreign_syntax({"prompt": ["a cat"], "negative_prompt": [prompt]})


@pytest.mark.parametrize(
    "prompt",
    ["", "a cat", "a 16:9 image (16:9)", "a (big) cat", "BREAK THE ICE AND GO", "a C++ book", "a cat, 50% off; why? <3"]
    + ["rock and roll", "snake_case_name", "a cat -- in the sun", "<my-cat> on a mat"]
    + ["a clock (at 12:30)", "(John 3:16)", "(John 3:5)", "she sayed [sic]", "a plot of f(x)2", "a (b: c)"],
)
def test_plain_text_is_left_alone(prompt):
    assert find_foreign_syntax(prompt) == []


def test_each_syntax_is_warned_of_once():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_foreign_syntax({"prompt": ["(a:1.2)", "(b:1.3) [c]"]})
    assert ["'(a:1.2)'" in str(found[0].message), "'[c]'" in str(found[1].message), len(found)] == [True, True, 2]


@pytest.mark.parametrize("piece", ["(", "(a", "((", "[", "{", "__", "a++", "embedding:", "<lora:"])
def test_long_prompts_take_no_time(piece):
    began = time.process_time()
    find_foreign_syntax(piece * 1_000_000)
    assert time.process_time() - began < 1
