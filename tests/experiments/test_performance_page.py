"""docs/performance.md: it is what the committed rows give, every ratio is theirs over ours, and no ratio mixes commits."""

import re
from pathlib import Path

import pytest

import performance_page
from performance_page import DOCS, NAMES, OPS, page, times
from reporting import comparisons, front
from reporting.rows import read


def op_row(name, ms, commit="a", what="forward", T=1 << 14, **more):
    shape = {"B": 2, "H": 4, "G": 1, "K": 128, "V": 64, "dtype": "bfloat16"}
    machine = {"gpu": "H", "torch": "2", "triton": "3", "date": "2026-01-02"}
    return {
        **machine,
        **shape,
        "T": T,
        "commit": commit,
        "name": name,
        "what": what,
        "ms": ms,
        "peak_bytes": 1 << 30,
        **more,
    }


def rows_of(*rows):
    return {name: [] for name in NAMES} | {"scalar_gate": list(rows)}


@pytest.fixture(scope="module")
def committed():
    return {name: read(name) for name in NAMES}


def test_the_committed_page_is_what_the_committed_rows_give(committed):
    text = (DOCS / "performance.md").read_text(encoding="utf-8")
    assert text == page(committed), "run python experiments/performance_page.py"
    assert {name for name in re.findall(r"\((figures/\w+\.svg)\)", text) if not (Path(DOCS) / name).exists()} == set()


def test_a_ratio_is_theirs_over_ours_and_below_one_it_is_bold_and_listed():
    peer = "flash attention 2, 16x96"
    text = page(
        rows_of(op_row("loglinear", 2.0), op_row(peer, 1.0), op_row("loglinear", 1.0, T=64), op_row(peer, 4.0, T=64))
    )
    lines = [line for line in text.splitlines() if "FlashAttention-2, 16 heads of 96" in line and "GiB" not in line]
    behind, fast, slow = lines
    assert behind == "| Ops: scalar gate | 16K tokens, forward | FlashAttention-2, 16 heads of 96 | **0.50** |"
    assert "| 1.00 ms | FlashAttention-2, 16 heads of 96 | 4.00 ms | 4.00 |" in fast
    assert "| 2.00 ms | FlashAttention-2, 16 heads of 96 | 1.00 ms | **0.50** |" in slow
    assert "In 1 of 2 comparisons of time with something else ours is slower. 0 of them" in text


@pytest.mark.parametrize("name", OPS)
def test_every_transition_has_a_table_once_it_has_rows(name):
    failed = {**op_row("fla gla", None), "what": "failed", "reason": "RuntimeError: no"}
    rows = [op_row("loglinear", 1.0), op_row("flash attention 2, 16x96", 2.0), failed]
    text = page(rows_of() | {"scalar_gate": []} | {name: rows})
    transition, model = OPS[name]
    assert f"## Ops: {transition} ({model})\n\n`python benchmarks/ops.py {name}`; H" in text
    assert f"## Memory: {transition}\n" in text
    assert "Not timed: the backward of flash-linear-attention's GLA, linear. It stops with: RuntimeError: no." in text
    assert text.count("## Ops: ") == 1


def test_a_ratio_is_of_the_newest_commit_that_has_both():
    ours, peer = "loglinear", "mamba2 ssd chunk 128"
    rows = [
        op_row(ours, 4, "a"),
        op_row(peer, 4, "a"),
        op_row(ours, 2, "b"),
        op_row(peer, 8, "b"),
        op_row(ours, 1, "c"),
    ]
    (line,) = comparisons.ops(rows)
    assert (line.ratio, line.row["commit"]) == (4, "b")


def test_linear_peers_are_told_apart():
    linear = [
        "mamba2",
        "mamba2 ssd chunk 128",
        "mamba2 selective_state_update",
        "fla gated_delta_rule",
        "gated_deltanet",
    ]
    assert all(comparisons.is_linear(comparisons.peer_name(name)) for name in linear)
    other = ["attention", "fla log_linear_attn", "flash attention 2, 16x96", "sdpa kv cache 48/8x64, cudnn"]
    assert not any(comparisons.is_linear(comparisons.peer_name(name)) for name in other)
    assert comparisons.is_linear("Gated DeltaNet, flash-linear-attention 0.2.2")


def test_numbers_just_below_one_are_not_called_slower():
    assert [times(x) for x in (0.5, 0.994, 0.996, 1.004, 9.994, 24.4, 525)] == [
        "**0.50**", "**0.99**", "1.00", "1.00", "9.99", "24", "525"
    ]  # fmt: skip


def test_every_command_and_its_rows_have_a_table(committed):
    text = page(committed)
    for name in set(NAMES) - {"lm", "context_parallel", *OPS}:
        assert f"`python benchmarks/{name}.py`" in text
    assert "`python benchmarks/ops.py scalar_gate`" in text
    assert "`python benchmarks/ops.py delta_rule`" in text
    assert "benchmarks/context_parallel.py`" in text
    assert "experiments/runs/lm.sh" in text
    assert not re.search(r"log_linear_|gated_deltanet|None|nan", text)


def test_without_rows_no_table_is_left():
    text = page(rows_of())
    assert re.findall(r"^## .*", text, re.M) == ["## Where it is slower"]


def test_the_chart_needs_all_five_and_says_what_its_rows_say(committed, tmp_path, monkeypatch):
    titles = []
    canvas = front.canvas
    monkeypatch.setattr(
        front, "canvas", lambda title, *args, **kwargs: titles.append(title) or canvas(title, *args, **kwargs)
    )
    front.draw_front(committed, tmp_path / "front")
    (title,) = titles
    page_rows = {(c.what, c.peer): c for c in comparisons.training(committed["training"])}
    ratio = page_rows["Log-Linear Mamba-2, 16K tokens", "Transformer, FlashAttention-2"].ratio
    assert f"trains {ratio:.2f} times as fast as a Transformer" in title
    with pytest.raises(ValueError, match="the chart needs"):
        front.draw_front(committed | {"lm": []}, tmp_path / "front")


def test_the_page_is_written_where_it_is_asked_for(committed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["performance_page.py", "--docs", str(tmp_path)])
    performance_page.main()
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in written] == ["performance.md", "front.png", "front.svg"]
    assert written[0].read_text(encoding="utf-8") == page(committed)
