"""The figure of decoding, from the committed rows."""

import pytest

import decoding_figure


def test_the_figure_has_the_rows_of_one_size(tmp_path, monkeypatch, capsys):
    def run(*options):
        monkeypatch.setattr("sys.argv", ["decoding_figure.py", "--figure", str(tmp_path / "decoding.png"), *options])
        decoding_figure.main()

    run()
    assert (tmp_path / "decoding.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "decoding.svg").read_text()
    assert "decoding.svg" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no rows of these sizes"):
        run("--B", "3")
