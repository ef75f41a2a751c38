"""Every command answers --help, and a wrong command or option is named."""

import pytest

from bench import sharding
from bench.__main__ import COMMANDS, main
from cge_fast.errors import UserError


def test_without_a_command_all_are_listed(capsys):
    main([])
    printed = capsys.readouterr().out
    assert all(f"  {command} " in printed for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_results_file(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert "--csv" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["sing"], "command: must be one of operators, .*, got 'sing'"),
        (["operators", "--shapes", "tiny", "huge"], "shapes.*'huge'.*'market1501', .*, 'tiny'"),
        (["operators", "--dtype", "int8"], "dtype.*int8.*float32"),
        (["count", "--target", "sm_70"], "target"),
        (["count", "--dtype", "float64"], "dtype"),
        (["predict", "--gpu", "b200"], "gpu.*'b200'.*'h100', 'a100', 'rtx4090', 'mi300x'"),
        (["predict", "--shape", "huge"], "shape.*'huge'.*'market1501', .*, 'tiny'"),
        (["sharding", "--batch", "0"], "batch.*\n.*0 does not conform"),
        (["evaluate", "--sizes", "cuhk03"], r"sizes.*cuhk03.*market1501.*msmt17"),
        (["step", "--settings", "vgg"], r"settings.*vgg.*resnet18"),
        (["operators", "--shape", "tiny"], r"^there is no --shape, did you mean --shapes\?$"),
    ],
)
def test_wrong_options_are_named(arguments, named):
    with pytest.raises(UserError, match=named):
        main(arguments)


def test_figures_go_to_the_file_and_their_tables_are_printed(tmp_path, capsys):
    file = tmp_path / "results.csv"
    main(["sharding", "--batch", "2", "--channels", "4", "--csv", str(file)])
    measured = capsys.readouterr().out
    main(["tables", "--csv", str(file)])
    assert capsys.readouterr().out == measured
    assert measured.startswith("## sharding\n\n| subject ")


def test_what_was_found_before_an_interruption_is_shown_and_kept(tmp_path, monkeypatch, capsys):
    first = next(sharding.measure(batch=2, channels=4, stripes=3))

    def interrupted(**options):
        yield first
        raise KeyboardInterrupt

    monkeypatch.setattr(sharding, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["sharding", "--csv", str(tmp_path / "results.csv")])
    assert "N 1e+05" in capsys.readouterr().out
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 2
