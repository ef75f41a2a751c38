"""Tables are made from figures: units with prefixes, ratios, marks, and what is the same for all left out."""

from dataclasses import replace

from bench.results import Figure, append
from bench.tables import document, tables, views

OURS = Figure("operators", "tiny, float32", "stripe_pool", "cge_kernels", "step", "s", 2e-3, 1.9e-3, 2.1e-3)
EAGER = replace(OURS, contender="eager", value=5e-3, low=4e-3, high=6e-3)
FLOOR = replace(OURS, contender="floor", value=1e-4, low=None, high=None)


def written(tmp_path, *figures: Figure) -> dict[str, list[list[str]]]:
    """The cells of each table of a file with these figures, without the rule."""
    list(append(figures, tmp_path / "results.csv"))
    return {
        name: [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "--" not in line]
        for name, table in tables(tmp_path / "results.csv").items()
    }


def test_contenders_stand_side_by_side_with_ratios_to_ours(tmp_path):
    found = written(tmp_path, OURS, EAGER, FLOOR)
    assert found["operators, tiny, float32"] == [
        ["subject: step, ms", "cge_kernels", "eager", "ratio", "floor"],
        ["stripe_pool", "2 (1.9, 2.1)", "5~ (4, 6)", "2.50x~", "0.1"],
    ]
    assert found["steps, tiny, float32"][1:] == [["stripe_pool", "2", "5~", "2.50x~", "0.1"]]


def test_what_differs_tells_the_rows_apart(tmp_path):
    peak = replace(OURS, quantity="peak", unit="B", value=3_000_000, low=None, high=None)
    found = written(tmp_path, OURS, peak, replace(peak, contender="eager", value=6_000_000))
    assert found["operators, tiny, float32"] == [
        ["quantity", "cge_kernels", "eager", "ratio"],
        ["step, ms", "2 (1.9, 2.1)", "", ""],
        ["peak, MB", "3", "6", "2.00x"],
    ]


def test_of_rates_more_is_better_and_of_shares_there_is_no_ratio(tmp_path):
    rate = replace(FLOOR, bench="step", contender="cge_kernels", quantity="images", unit="images/s", value=30.0)
    share = replace(rate, quantity="share of head", unit="%", value=50.0)
    found = written(
        tmp_path, rate, replace(rate, contender="eager", value=10.0), share, replace(share, contender="eager")
    )
    assert [row[-1] for row in found["step"]] == ["ratio", "3.00x", ""]


def test_heads_of_all_shapes_are_in_one_table_and_a_write_is_a_step(tmp_path):
    heads = [replace(OURS, subject="head, gem", setting=setting) for setting in ("tiny, float32", "msmt17, float32")]
    write = replace(OURS, subject="write_memory_", quantity="forward")
    found = written(tmp_path, *heads, write)
    assert [row[0] for row in found["head"]] == ["setting: step, ms", "tiny, float32", "msmt17, float32"]
    assert [row[0] for row in found["steps, tiny, float32"]] == ["subject: step, ms", "head, gem", "write_memory_"]


def test_whole_steps_of_all_settings_are_in_one_table(tmp_path):
    step = replace(FLOOR, bench="traffic", setting="tiny, bfloat16, sm_90", subject="step, gem", unit="B", value=5e6)
    found = written(tmp_path, step, replace(step, setting="tiny, float32, sm_90"), replace(step, subject="stripe_pool"))
    assert [row[0] for row in found["traffic of a step"][1:]] == ["tiny, bfloat16, sm_90", "tiny, float32, sm_90"]


def test_predictions_stand_beside_what_was_measured_on_their_gpu():
    predicted = replace(FLOOR, bench="predict", setting="tiny, float32, H100 SXM5", contender="predicted")
    on_gpu = replace(OURS, origin="NVIDIA H100 80GB HBM3; torch; commit; time")
    beside = views([on_gpu, predicted])["operators, tiny, float32"]
    assert [figure.contender for figure in beside] == ["cge_kernels", "H100 SXM5, predicted"]
    assert len({figure.setting for figure in beside}) == 1
    assert views([replace(on_gpu, origin="a CPU"), predicted])["operators, tiny, float32"][1:] == []


def test_the_document_says_where_figures_are_from():
    assert (
        document([replace(OURS, origin="a CPU; torch 2; abc; today")]).split("\n\n")[2] == "a CPU; torch 2; abc; today"
    )
