"""The renderers: nothing of a token is run or lost, and every value can be read."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from attnlrp import show
from attnlrp.errors import InputError
from attnlrp.explanation import Candidate, ExplainedTarget, Explanation
from attnlrp.show import colours, html, image, terminal, text

HOSTILE = [
    "<script>alert(1)</script>",
    "</script>",
    "<!--",
    "\u2028",
    '"><img src=x onerror=y>',
    "'",
    "&amp;",
    "{{ 7*7 }}",
]
UNUSUAL = [
    "日本",
    "語",
    " 👨\u200d👩\u200d👧",
    " שלום",
    "\n",
    "\t",
    "a\u200bb",
    "\x1b[31m",
    "\u202eevil",
    "",
    "   ",
    "é[1/2]",
    "$x^2$",
]
CANDIDATES = (Candidate(" Germany", 1, 14.52), Candidate(" France", 2, 13.25), Candidate("<b>", 3, 12.5))


def build(tokens: list[str], rows: list[list[float]], **target: object) -> Explanation:
    fields = {"token": " Germany", "id": 1, "position": len(tokens) - 1, "logit": 14.52, "rank": 1} | target
    fields.setdefault("candidates", CANDIDATES)
    count = len(tokens)
    return Explanation(
        tokens=tuple(tokens),
        token_ids=tuple(range(count)),
        relevance=torch.tensor(rows).reshape(len(rows), count),
        targets=tuple(ExplainedTarget(**fields | ({"token": f" out{k}"} if k else {})) for k in range(len(rows))),
        special=tuple(token == "<bos>" for token in tokens),
        segments=("prompt",) * (count - 1) + ("generated" if len(rows) > 1 else "prompt",),
        words=tuple(range(count)),
        model="tiny",
        rules="attnlrp",
        task="causal-lm",
        version="0",
    )


@pytest.fixture
def single() -> Explanation:
    return build(["<bos>", "Paris", " is", " Berlin", "\n", " of"], [[1.5, -0.25, 0.0, 4.0, 0.125, -2.0]])


@pytest.fixture
def several() -> Explanation:
    return build(["The", " cat", " sat"], [[1.0, -2.0, 0.0], [0.5, 0.0, -0.125]])


def printed(explanation: Explanation, *, width: int = 100, colour: bool = False, **options: object) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=colour, color_system="truecolor" if colour else None)
    console.print(terminal.render(explanation, **options))
    return file.getvalue()


class Parsed(HTMLParser):
    """Elements with their attributes, and the text inside each."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        self.elements.append(("/" + tag, {}, []))  # text behind an element is not its own

    def handle_data(self, data: str) -> None:
        if self.elements:
            self.elements[-1][2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, "".join(words)) for name, attributes, words in self.elements if name == tag]

    @property
    def cells(self) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, words) for attributes, words in self.all("span") if "data-l" in attributes]

    @property
    def data(self) -> dict[str, list]:
        return json.loads(self.all("script")[0][1])


# --- text


@pytest.mark.parametrize(
    ("token", "label", "inline"),
    [
        (" Paris", "␣Paris", " Paris"),
        ("\n\n", "↵↵", "↵\n↵\n"),
        ("a\tb", "a⇥b", "a⇥b"),
        ("", "∅", ""),
        ("  ", "␣␣", "  "),
        ("\x1b[31m", "⟨U+001B⟩[31m", "⟨U+001B⟩[31m"),
        ("a\u200bb", "a⟨U+200B⟩b", "a⟨U+200B⟩b"),
        ("\u202eevil", "⟨U+202E⟩evil", "⟨U+202E⟩evil"),
        ("\ud800", "⟨U+D800⟩", "⟨U+D800⟩"),
        ("👨\u200d👩", "👨\u200d👩", "👨\u200d👩"),
        ("a\u200db", "a⟨U+200D⟩b", "a⟨U+200D⟩b"),
    ],
)
def test_nothing_in_a_token_is_invisible(token: str, label: str, inline: str) -> None:
    assert text.label(token) == label
    assert text.inline(token) == inline


def test_position_may_be_absent() -> None:
    explanation = build(["a", "b"], [[1.0, 2.0]], position=None)
    assert text.facts(explanation, explanation.targets[0]) == ["logit +14.52", "rank 1"]
    assert "underlined" not in html.page(explanation)
    assert "a" in printed(explanation)
    assert printed(build(["a", "b"], [[1.0, 0.0]] * 2, position=None))


def test_balance_claims_no_absorption_for_the_plain_gradient(single: Explanation) -> None:
    gradient = dataclasses.replace(single, rules="gradient")
    assert text.balance(gradient, 0).endswith("+14.52; the plain gradient keeps no account of the rest.")


def test_label_is_cut_and_isolated() -> None:
    assert text.label("x" * 50, width=5) == "xxxx…"
    assert text.isolate("שלום") == "\u2068שלום\u2069"
    assert text.isolate("Paris") == "Paris"


def test_numbers() -> None:
    assert text.signed(1.23456, "logit") == "+1.235 logit"
    assert [text.signed(v) for v in (-0.5, 0.0, 1234.5, 1e-7)] == ["-0.5000", "0", "+1234", "+1.000e-07"]
    assert text.column([12.3456, -0.5]) == ["+12.35", "-0.50"]
    assert text.column([1e-9, -2e-9]) == ["+1.000e-09", "-2.000e-09"]
    assert text.column([0.0]) == ["+0.000"]


def test_contrastive_target_is_called_a_difference() -> None:
    explanation = build(["a", "b"], [[1.0, 2.0]], against=" France", rank=None)
    assert text.facts(explanation, explanation.targets[0]) == [
        "logit difference +14.52",
        "against ␣France",
        "read at token 1 b",
    ]


# --- terminal


def test_terminal_without_colour_has_every_fact(single: Explanation) -> None:
    out = printed(single)
    assert "\x1b" not in out
    for words in (
        "tiny",
        "rules attnlrp",
        "␣Germany",
        "logit +14.52",
        "rank 1",
        "␣France +13.25",
        "relevance in logit",
    ):
        assert words in out
    assert re.search(r"1 +␣Berlin +3 +\+4\.000 +50\.8%", out)
    assert re.search(r"2 +␣of +5 +-2\.000 +25\.4%", out)
    assert "Relevance sums to +3.375 of logit +14.52; biases, softmax and constants absorb the rest." in out


def test_terminal_colours_the_tokens(single: Explanation) -> None:
    red, green, blue = (int(colours.scale(1.0, dark=True)[i : i + 2], 16) for i in (1, 3, 5))
    assert f"48;2;{red};{green};{blue}m Berlin" in printed(single, colour=True, dark=True)
    assert f"48;2;{red};{green};{blue}m" not in printed(single, colour=True, dark=False)


def test_terminal_top(single: Explanation) -> None:
    assert "Paris  " in printed(single, top=4)
    assert "Paris  " not in printed(single, top=3)


@pytest.mark.parametrize("rows", [1, 2])
def test_terminal_never_interprets_tokens(rows: int) -> None:
    tokens = ["[red]x[/red]", "[/]", "[link=file:///]y[/link]", "\x1b[31m", ":smile:"]
    out = printed(build(tokens, [[1.0, 2.0, 3.0, 4.0, 5.0]] * rows, token="[bold]z"))
    for token in (*tokens[:3], tokens[4], "[bold]z"):
        assert token in out
    assert "\x1b" not in out


def test_terminal_keeps_wide_characters_in_line() -> None:
    out = printed(build(["日本語", "ab", "👍"], [[3.0, -2.0, 1.0]]))
    rows = [line for line in out.splitlines() if "━" in line]
    assert len({cell_len(line[: line.index("━")]) for line in rows}) == 1


def test_terminal_several_targets(several: Explanation) -> None:
    out = printed(several)
    assert out.count("The cat sat") == 2
    assert "␣cat -2.000 · The +1.000" in out
    assert re.search(r"␣out1 +\+0\.5 +0 +-0\.12", out)
    assert not re.search(r"␣out1 +\+0\.5 +0", printed(several, width=20))


def test_terminal_shortens_long_inputs_of_several_targets() -> None:
    row = [0.0] * 1000
    row[500], row[999] = 2.0, -1.0
    out = printed(build([f" w{i}" for i in range(1000)], [row, row]))
    assert "w499 w500 w501 …" in out
    assert "w700" not in out
    assert len(out.splitlines()) < 30


def test_show_prints_to_stdout(single: Explanation, capsys: pytest.CaptureFixture[str]) -> None:
    single.show()
    assert "␣Germany" in capsys.readouterr().out


def test_light_terminals_are_recognised(single: Explanation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLORFGBG", "0;15")
    assert printed(single, colour=True) == printed(single, colour=True, dark=False)
    monkeypatch.setenv("COLORFGBG", "15;0")
    assert printed(single, colour=True) == printed(single, colour=True, dark=True)


# --- HTML


@pytest.mark.parametrize("render", [html.page, html.fragment])
def test_html_shows_hostile_tokens_and_runs_none(render: object) -> None:
    rows = [[float(i + 1) for i in range(len(HOSTILE))]] * 2
    document = Parsed(render(build(HOSTILE, rows, token='"><script>alert(2)</script>', against="</script>")))
    assert "".join(words for _, words in document.cells) == "".join(map(text.inline, HOSTILE))
    assert len(document.all("script")) == 2
    assert not document.all("img")
    assert not [name for _, attributes, _ in document.elements for name in attributes if name.startswith("on")]


def test_html_data_cannot_leave_its_element() -> None:
    source = html.page(build(["a", "b"], [[1.0, 2.0]], unit="</script><!--\u2028'"))
    (_, raw), _ = Parsed(source).all("script")
    assert not set("<>&'\u2028") & set(raw)
    assert json.loads(raw)["units"] == ["</script><!--\u2028'"]


def test_html_value_of_every_token_is_in_its_title(single: Explanation) -> None:
    titles = [attributes["title"] for attributes, _ in Parsed(html.page(single)).cells]
    expected = ["+1.500", "-0.2500", "0", "+4.000", "+0.1250", "-2.000"]
    assert titles == [f"{value} logit" for value in expected]


def test_html_states_target_runners_up_legend_and_sum(single: Explanation) -> None:
    source = html.page(single)
    for words in ("␣Germany", "logit +14.52", "rank 1", "␣France", "+13.25", "&lt;b&gt;", "-4.000", "50.8%"):
        assert words in source
    for words in ("rounded to 4 significant digits", "relevance in logit", "Relevance sums to +3.375"):
        assert words in source


def test_html_levels_follow_the_scale(single: Explanation) -> None:
    source = html.page(single)
    assert [attributes["data-l"] for attributes, _ in Parsed(source).cells] == ["8", "-1", "0", "20", "1", "-10"]
    style = Parsed(source).all("style")[0][1]
    for level in (-20, -7, 0, 20):
        pair = colours.scale(level / 20), colours.scale(level / 20, dark=True)
        assert f'[data-l="{level}"] {{ background: light-dark({pair[0]}, {pair[1]}); }}' in style


def test_page_needs_no_network(several: Explanation) -> None:
    source = html.page(several)
    attributes = {name for _, attributes, _ in Parsed(source).elements for name in attributes}
    assert not attributes & {"src", "href", "srcset", "action", "style"}
    assert not re.search(r"https?:|url\(|@import|fetch\(|import\(", source)


def test_page_policy_allows_its_own_style_and_script_only(several: Explanation) -> None:
    document = Parsed(html.page(several))
    policy = next(a["content"] for a, _ in document.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for kind, source in (("style", document.all("style")[0][1]), ("script", document.all("script")[1][1])):
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_page_is_reproducible(several: Explanation) -> None:
    assert html.page(several) == html.page(several)


def test_html_several_targets(several: Explanation) -> None:
    document = Parsed(html.page(several))
    buttons = document.all("button")
    assert [attributes["aria-pressed"] for attributes, _ in buttons] == ["true", "false"]
    assert {attributes["type"] for attributes, _ in buttons} == {"button"}
    panels = [attributes for attributes, _ in document.all("div") if "data-panel" in attributes]
    assert [(panel["data-panel"], "hidden" in panel) for panel in panels] == [("0", False), ("1", True)] * 2
    assert document.data["values"] == ["+1.000 -2.000 0", "+0.5000 0 -0.1250"]
    assert document.data["levels"] == ["10 -20 0", "20 0 -5"]
    groups = [attributes["aria-label"] for attributes, _ in document.all("div") if attributes.get("class") == "tokens"]
    assert groups == ["prompt tokens", "generated tokens"]


def test_single_target_has_no_buttons(single: Explanation) -> None:
    assert "<button" not in html.page(single)


def test_fragments_do_not_disturb_each_other(several: Explanation) -> None:
    first, second = several._repr_html_(), show.fragment(several)
    names = [re.findall(r'<div id="([^"]+)"', source) for source in (first, second)]
    assert [len(found) for found in names] == [1, 1]
    assert names[0] != names[1]
    for source, (name,) in zip((first, second), names, strict=True):
        style = Parsed(source).all("style")[0][1]
        selectors = re.findall(r"^(\S[^{}]*)\{", re.sub(r"/\*.*?\*/", "", style), re.MULTILINE)
        assert selectors
        assert all(f"#{name}" in part for selector in selectors for part in selector.split(","))
        assert f'getElementById("{name}")' in Parsed(source).all("script")[1][1]
        assert "<html" not in source


def test_page_of_many_targets_is_small() -> None:
    torch.manual_seed(0)
    source = html.page(build([f" word{i}" for i in range(2000)], torch.randn(40, 2000).tolist()))
    assert len(source.encode()) < 1_500_000


# --- figures


@pytest.mark.parametrize(
    ("suffix", "magic"), [(".png", b"\x89PNG\r\n\x1a\n"), (".PNG", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")]
)
def test_save_figure(suffix: str, magic: bytes, single: Explanation, tmp_path: Path) -> None:
    path = show.save(single, tmp_path / f"figure{suffix}")
    assert path.read_bytes().startswith(magic)
    assert path.stat().st_size > 2000


def test_figure_states_target_and_unit(single: Explanation) -> None:
    drawing = image.figure(single)
    words = [words.get_text() for words in drawing.texts]
    assert words[:2] == ["␣Germany", "logit +14.52 · rank 1 · read at token 5 ␣of"]
    assert "relevance in logit" in words
    assert [tick.get_text() for tick in drawing.axes[1].get_xticklabels()] == ["-4.000", "0", "+4.000"]
    assert [words.get_text() for words in drawing.axes[0].texts] == ["<bos>", "Paris", " is", " Berlin", "↵", " of"]


def test_figure_wraps_tokens_into_lines() -> None:
    drawing = image.figure(build([" wordword"] * 30 + ["x" * 200], [[1.0] * 31]))
    words = drawing.axes[0].texts
    assert max(w.get_position()[0] + len(w.get_text()) for w in words) <= 80
    assert len({w.get_position()[1] for w in words}) == 7


def test_figure_of_several_targets_is_a_matrix(several: Explanation) -> None:
    axes = image.figure(several).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["The", "␣cat", "␣sat"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["␣Germany", "␣out1"]
    assert axes.images[0].get_array().tolist() == [[0.5, -1.0, 0.0], [0.25, 0.0, -0.0625]]


def test_figure_changes_nothing_global(single: Explanation) -> None:
    from matplotlib import pyplot

    before = dict(pyplot.rcParams)
    image.figure(single)
    assert dict(pyplot.rcParams) == before
    assert pyplot.get_fignums() == []


def test_figure_too_long() -> None:
    with pytest.raises(InputError, match=r"more than the 1000 of a figure; save \.html"):
        image.figure(build(["\n"] * 1001, [[1.0] * 1001]))


def test_figure_without_matplotlib(single: Explanation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(InputError, match=r'pip install "attnlrp\[plot\]"'):
        single.save(tmp_path / "figure.png")


# --- all renderers


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("values", ["unusual", "zero", "broken"])
def test_every_renderer_takes_every_input(rows: int, values: str, tmp_path: Path) -> None:
    count = len(UNUSUAL)
    row = {"unusual": [(-1.0) ** i * i for i in range(count)], "zero": [0.0] * count}.get(values)
    row = row or [math.nan, math.inf, -math.inf] + [1.0] * (count - 3)
    explanation = build(UNUSUAL, [row] * rows, token=" שלום", logit=row[0], candidates=())
    assert "⟨U+001B⟩[31m" in printed(explanation, width=150)
    document = Parsed(html.page(explanation))
    assert "".join(words for _, words in document.cells) == "".join(map(text.inline, UNUSUAL))
    if values == "zero":
        assert {attributes["data-l"] for attributes, _ in document.cells} == {"0"}
    show.save(explanation, tmp_path / "figure.png")


def test_merged_words() -> None:
    whole = build(["Ber", "lin", " is"], [[1.0, 2.0, -0.5]])
    merged = dataclasses.replace(whole, words=(0, 0, 1)).merge_words()
    assert re.search(r"1 +Berlin +0 +\+3\.000", printed(merged))
    assert [(a["title"], words) for a, words in Parsed(html.page(merged)).cells] == [
        ("+3.000 logit", "Berlin"),
        ("-0.5000 logit", " is"),
    ]


def test_save_by_suffix(single: Explanation, tmp_path: Path) -> None:
    assert show.save(single, tmp_path / "a.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    for suffix in (".json", ".safetensors"):
        assert Explanation.load(show.save(single, str(tmp_path / f"a{suffix}"))).tokens == single.tokens
    with pytest.raises(
        InputError, match=r"cannot write \.docx; expected \.html, \.json, \.pdf, \.png, \.safetensors or"
    ):
        single.save(tmp_path / "a.docx")
    with pytest.raises(InputError, match="cannot write a file without suffix"):
        show.save(single, tmp_path / "a")


def test_import_loads_no_renderer() -> None:
    code = "import sys, attnlrp.show; print(sorted({'rich', 'jinja2', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("module", [show, colours, html, image, terminal, text])
def test_public_names_are_sorted(module: object) -> None:
    assert module.__all__ == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
