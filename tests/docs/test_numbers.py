"""Numbers in the documents are measured, or quoted in the configurations; tables are complete."""

import json
import re

from doc_commands import ROOT

RESULTS = ROOT / "benchmarks" / "results"
SECTIONS = json.loads((RESULTS / "amd-epyc-2-cores.json").read_text())
CONFIGS = {
    path.stem: path.read_text()
    for path in (ROOT / "configs").glob("*.yaml")
    if not path.stem.startswith("Base-")
}


def value(section: str, who: str, **row) -> float:
    """Milliseconds, or MiB, of one measurement."""
    (found,) = [
        one
        for one in SECTIONS[section]["rows"]
        if one["who"] == who and all(one[key] == wanted for key, wanted in row.items())
    ]
    return found["mib"] if "mib" in found else found["ms"]


def rows(document: str, heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    text = (ROOT / document).read_text().split(f"# {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines[2:]]


# -------------------------------------------------------------------------------------- measured

SPEED = {
    "encoder: sampling, forward": ("encoder", "forward"),
    "encoder: sampling, backward": ("encoder", "backward"),
    "encoder: whole module, forward and backward": ("encoder", "module"),
    "its peak memory": ("encoder", "peak MiB"),
    "decoder with 500 queries: whole module, forward and backward": ("decoder 500", "module"),
}


def test_the_speed_of_attention_is_what_was_measured():
    table = rows("docs/speed.md", "Deformable attention")
    assert [name for name, _, _ in table] == list(SPEED)
    for name, ours, theirs in table:
        case, measure = SPEED[name]
        a, b, c = (
            value("ms_deform_attn", who, case=case, measure=measure)
            for who in ("dn_detr", "plain", "grid_sample")
        )
        unit = "MiB" if measure == "peak MiB" else "ms"
        assert ours == f"{a:.0f} {unit}", name
        assert theirs == f"{min(b, c):.0f} {unit} ({min(b, c) / a:.0f}x)", name


def first_screen() -> dict[str, list[str]]:
    """The table of measured numbers in the README: what -> cells."""
    text = (ROOT / "README.md").read_text().split("**Install**")[0]
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {line[0].strip(): [cell.strip(" *`") for cell in line[1:]] for line in lines[1:]}


def test_the_numbers_of_the_first_screen_are_those_of_the_documents():
    gain, speed = first_screen().values()
    iterations, denoised, without = (
        table.split("|")[1:6]
        for table in (ROOT / "docs" / "comparisons.md").read_text().splitlines()
        if re.match(r"\| (iterations|denoised|without denoising) \|", table)
    )
    assert iterations[-1].strip() == "2000"
    assert gain[:2] == [denoised[-1].strip(" *"), without[-1].strip()]
    (row,) = [row for row in rows("docs/speed.md", "Deformable attention") if "module" in row[0]][
        :1
    ]
    assert speed[:2] == [row[1], row[2].split(" (")[0]]
    section = SECTIONS["ms_deform_attn"]
    assert speed[2] in section["commands"]


def test_the_picture_of_the_first_screen_is_drawn_from_the_table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "dev"))
    import draw_denoising_gain as drawing

    text = (ROOT / "docs" / "comparisons.md").read_text()
    assert drawing.draw(text) == drawing.PICTURE.read_text()


def test_a_training_step_and_denoising_queries_take_what_was_measured():
    text = " ".join((ROOT / "docs" / "speed.md").read_text().split())
    ours, plain = (value("train_step", who) / 1000 for who in ("denoised", "plain operators"))
    assert f"takes {ours:.1f} s, and {plain:.1f} s with all operators in PyTorch" in text
    cases = SECTIONS["denoising_queries"]["rows"]
    keys = SECTIONS["denoising_queries"]["keys"]
    published = "published style, mask as numbers"
    times = [
        [value("denoising_queries", who, **{key: row[key] for key in keys}) for row in cases]
        for who in ("dn_detr", published)
    ]
    ratios = [b / a for a, b in zip(*times, strict=True)]
    assert f"take {min(times[0]):.2f} to {max(times[0]):.2f} ms" in text
    assert f"takes {min(ratios):.0f} to {max(ratios):.0f} times as long" in text


AUXILIARY = {
    "": "plain",
    "a teacher": "teacher",
    "denoising": "denoised",
    "denoising and a teacher": "denoised, teacher",
    "denoising, matchability-aware loss": "denoised, matchability",
    "denoising, 4 times the objects (a mosaic has that many)": "denoised, 4 x objects",
    "boxes denoised": "boxes denoised",
    "boxes and masks denoised": "denoised",
    "groups": "groups",
}


def test_auxiliary_queries_cost_what_was_measured():
    host, plain = "", []
    table = rows("docs/comparisons.md", "What it costs")
    for name, what, *costs in table:
        host = name or host
        found = [
            value("auxiliary_queries", AUXILIARY[what], host=host, measure=measure)
            for measure in ("ms", "peak MiB")
        ]
        if what:
            expected = [f"{a / b:.2f}x" for a, b in zip(found, plain, strict=True)]
        else:
            plain, expected = found, [f"{found[0]:.0f} ms", f"{found[1]:.0f} MiB"]
        assert costs == expected, (host, what)
    assert len(table) == len(SECTIONS["auxiliary_queries"]["rows"]) / 2


def test_the_tables_of_results_are_rendered_from_them(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import render

    assert render.render(RESULTS) == (RESULTS / "README.md").read_text()


# ------------------------------------------------------------------------------------- published


def named(cell: str) -> list[str]:
    """`a` (`_b`, `_c`), `d` are a, a_b, a_c and d."""
    names, first = [], ""
    for name in re.findall(r"`(\w+)`", cell):
        first = first if name.startswith("_") else name
        names.append(first + name if name.startswith("_") else name)
    return names


METHODS = rows("docs/methods.md", "Methods")


def test_every_configuration_is_in_the_table_of_methods_and_in_that_of_sizes():
    assert {name for row in METHODS for name in named(row[2])} == CONFIGS.keys()
    sizes = rows("docs/model_sizes.md", "Model sizes")
    assert {name for row in sizes for name in named(row[0])} == CONFIGS.keys()


def test_published_numbers_are_those_that_the_configurations_state():
    for method, _, configurations, published in METHODS:
        heads = [CONFIGS[name].split("_BASE_")[0] for name in named(configurations)]
        for number in re.findall(r"\d\d\.\d", published):
            assert any(number in head for head in heads), (method, number)
